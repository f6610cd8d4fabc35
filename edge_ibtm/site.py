"""A merge site: one place in a backbone where tokens are merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .constants import constant
from .errors import UsageError
from .mergers import Merger, Tokens
from .mergers.base import Squares
from .mergers.controls import Identity
from .plan import (
    Change,
    DensePlan,
    GridPlan,
    Plan,
    PrefixPlan,
    column,
    dense_plan,
    flat,
    fold_columns,
    fold_rows,
    sequence_plan,
)
from .short_lines import is_short, squared_lengths
from .tokens import Route, check_ratio, kept_grid, kept_tokens, tiles

_FIELDS = ("z", "metric", "size", "weight", "masses", "penalty", "importance")


@dataclass(frozen=True)
class Merged:
    """What a site made of its tokens.

    x [B, P, D]; size [B, P]; plan: how any features of these tokens are pooled and copied back (None: nothing merged);
    grid: (H', W') or None; weight [B, N]: w of the entering tokens; logits [B, N] and merged_logits [B, P]: IBTM's mask.
    """

    x: Tensor
    size: Tensor
    plan: Plan | None
    grid: tuple[int, int] | None
    weight: Tensor
    logits: Tensor | None
    merged_logits: Tensor | None

    def pool(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, P, D]."""
        return x if self.plan is None else self.plan.pool(x)

    def copy(self, y: Tensor) -> Tensor:
        """[B, P, D] -> [B, N, D]."""
        return y if self.plan is None else self.plan.copy(y)

    def copied(self, y: Tensor, change: Change) -> Tensor:
        """y [B, P, D], changed token by token and copied back: [B, N, D]."""
        return self.plan.copied(y, change) if isinstance(self.plan, GridPlan) else self.copy(change(y))


class Site(nn.Module):
    """Merges with one merger at one keep ratio, in sequence or grid layout.

    Stateless but for the merger's parameters; every count follows from the shape of the tokens. longest, rows_alone,
    strided: see `tokens.kept_grid`.
    """

    def __init__(
        self, merger: Merger, keep_ratio: float, layout: str, depth: float = 0.0, longest: int = 16,
        rows_alone: bool = False, strided: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_ratio(keep_ratio)
        if layout not in ("sequence", "grid"):
            raise UsageError(f"unknown layout {layout!r}; known: sequence, grid")
        self.merger, self.keep_ratio, self.layout, self.depth = merger, keep_ratio, layout, depth
        self.longest, self.rows_alone, self.strided = longest, rows_alone, strided

    def extra_repr(self) -> str:
        return f"keep_ratio={self.keep_ratio}, layout={self.layout!r}, depth={self.depth:.2f}"

    def kept(self, tokens: int, prefix: int, grid: tuple[int, int] | None) -> int:
        """Tokens that leave for `tokens` that enter."""
        if isinstance(self.merger, Identity):
            return tokens
        if self.layout == "sequence":
            return kept_tokens(tokens, self.keep_ratio, prefix)
        assert grid is not None
        if grid[0] * grid[1] + prefix != tokens:
            raise UsageError(f"grid {grid[0]} x {grid[1]} does not hold {tokens} tokens, {prefix} of them prefix")
        height, width = self._kept_grid(grid)
        return prefix + height * width

    def _kept_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return kept_grid(*grid, self.keep_ratio, self.longest, self.rows_alone, self.strided)

    def forward(self, tokens: Tokens, grid: tuple[int, int] | None = None, turned: bool = False) -> Merged:
        """Merge tokens (z [B, N, D]); a grid layout needs the grid (H, W), N = H * W.

        turned: nothing that follows depends on the order of the merged tokens, so a grid's may stay in column order, and
        those of a line in the order that costs least.
        """
        if self.kept(tokens.z.shape[1], tokens.prefix, grid) == tokens.z.shape[1]:
            return Merged(tokens.z, tokens.size, None, grid, ones(tokens.z), tokens.logits, tokens.logits)
        tokens = self.merger.prepare(replace(tokens, depth=self.depth, squares=self._squares(tokens, grid)))
        if self.layout == "sequence":
            return self._sequence(tokens)
        assert grid is not None
        return self._grid(tokens, grid, turned)

    def _sequence(self, tokens: Tokens) -> Merged:
        keep = kept_tokens(tokens.z.shape[1], self.keep_ratio, tokens.prefix)
        route = self._route(tokens, keep)
        plan = sequence_plan(route, tokens.mass(), self.merger.preserves_norm(tokens))
        return _merged(tokens, plan, None)

    def _squares(self, tokens: Tokens, grid: tuple[int, int] | None) -> Squares | None:
        """|z_n|^2 from the products that similarities along short rows take anyhow."""
        if grid is None or tokens.prefix or tokens.metric is not tokens.z:
            return None
        cuts = tiles(grid[1], self.longest)
        if not is_short(grid[1] // cuts) or self._kept_grid(grid)[1] == grid[1]:
            return None
        return lambda a, b: squared_lengths(fold_rows(tokens.z, grid, cuts), a, b).reshape(tokens.size.shape)

    def _grid(self, tokens: Tokens, grid: tuple[int, int], turned: bool) -> Merged:
        kept = self._kept_grid(grid)
        cuts = (tiles(grid[0], self.longest), tiles(grid[1], self.longest))
        rows = columns = None
        current = _without_prefix(tokens)
        if kept[1] < grid[1]:
            last = kept[0] == grid[0]
            lines = _lines(current, lambda x: fold_rows(x, grid, cuts[1]), ordered=not (turned and last))
            rows = self._line_plan(lines, kept[1] // cuts[1])
            current = _pooled(current, GridPlan(grid, (grid[0], kept[1]), cuts, rows, None))
        if kept[0] < grid[0]:
            lines = _lines(current, lambda x: fold_columns(x, (grid[0], kept[1]), cuts[0]), ordered=not turned)
            columns = self._line_plan(lines, kept[0] // cuts[0])
        plan = GridPlan(grid, kept, cuts, rows, columns, turned and columns is not None)
        return _merged(tokens, PrefixPlan(tokens.prefix, plan) if tokens.prefix else plan, kept)

    def _route(self, tokens: Tokens, keep: int) -> Route:
        """Where tokens go, without autocast: bfloat16 counts no further than 256."""
        device = tokens.z.device.type
        if not torch.is_autocast_enabled(device):
            return self.merger.route(tokens, keep)
        with torch.autocast(device, enabled=False):
            return self.merger.route(tokens, keep)

    def _line_plan(self, lines: Tokens, keep: int) -> DensePlan:
        route = self._route(lines, keep)
        return dense_plan(route, lines.mass(), self.merger.preserves_norm(lines))


def _without_prefix(tokens: Tokens) -> Tokens:
    """The grid's tokens alone."""
    p = tokens.prefix
    if not p:
        return tokens
    cut: dict[str, Any] = {name: None if (x := getattr(tokens, name)) is None else x[:, p:] for name in _FIELDS}
    return replace(tokens, prefix=0, **cut)


def ones(z: Tensor) -> Tensor:
    """Sizes [B, N] of the unmerged tokens z [B, N, D]."""
    return constant("sizes", z.shape[0], z.shape[1], like=z)


def _vector(x: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if x is None else flat(change(column(x)))


def _lines(tokens: Tokens, fold: Callable[[Tensor], Tensor], ordered: bool) -> Tokens:
    """The same tokens with every field folded into lines."""
    z = fold(tokens.z)
    size = flat(fold(column(tokens.size)))
    return replace(
        tokens,
        z=z,
        metric=z if tokens.metric is tokens.z else fold(tokens.metric),
        size=size,
        weight=_vector(tokens.weight, fold),
        masses=_vector(tokens.masses, fold),
        penalty=_vector(tokens.penalty, fold),
        importance=_vector(tokens.importance, fold),
        ordered=ordered,
    )


def _pooled(tokens: Tokens, plan: GridPlan) -> Tokens:
    """Tokens after the row pass: features averaged, sizes and masses summed."""
    z = plan.pool(tokens.z)
    return replace(
        tokens,
        z=z,
        metric=z if tokens.metric is tokens.z else plan.pool(tokens.metric),
        size=plan.total(tokens.size),
        weight=None,
        masses=plan.total(tokens.mass()),
        penalty=None if tokens.penalty is None else plan.mean(tokens.penalty),
        importance=None if tokens.importance is None else plan.mean(tokens.importance),
    )


def _merged(tokens: Tokens, plan: Plan, grid: tuple[int, int] | None) -> Merged:
    weight = ones(tokens.z) if tokens.weight is None else tokens.weight
    return Merged(
        x=plan.pool(tokens.z),
        size=plan.total(tokens.size),
        plan=plan,
        grid=grid,
        weight=weight,
        logits=tokens.logits,
        merged_logits=_vector(tokens.logits, plan.pool),
    )

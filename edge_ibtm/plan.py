"""A plan: where the tokens of one site go, ready to be applied to any features of those tokens.

    pool(x)  [B, N, D] -> [B, P, D]   weighted averages of the tokens that merge
    copy(y)  [B, P, D] -> [B, N, D]   every merged token back to the places it came from (zeros where dropped)
    matrix() [B, P, N]                the assignment S

Grids compose two of them, rows then columns, whose matrices are tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .constants import constant
from .short_lines import as_type, averages, is_short, summable, sums
from .tokens import Route, row_max, unit

Change = Callable[[Tensor], Tensor]  # of every token [.., D] alone


@dataclass(frozen=True)
class DensePlan:
    """Lines merged by small matrices, in the form that lowers into one delegate.

    share: S [R, P, L]; average: S with the weights in it, rows summing to one; preserve_norm: ToFu's merge, the mean's
    direction with the largest of the merged norms (arXiv 2312.01026, section 3.3).
    """

    share: Tensor
    average: Tensor
    preserve_norm: bool = False

    def pool(self, x: Tensor) -> Tensor:
        mean = self.average @ x
        return _with_norm(mean, x, self.share) if self.preserve_norm else mean

    def copy(self, y: Tensor) -> Tensor:
        lines, merged, length = self.share.shape
        if merged == 1:  # a constant [R, L, 1] that is a transpose keeps strides that the runtime takes for another shape
            return self.share.reshape(lines, length, 1) @ y
        return self.share.transpose(1, 2) @ y

    def matrix(self) -> Tensor:
        return self.share

    def total(self, size: Tensor) -> Tensor:
        """Sums over merged tokens of size [R, L]: [R, P]."""
        return sums(self.share, size)

    def mean(self, values: Tensor) -> Tensor:
        """`pool` of one number a token, whose norm nothing preserves: [R, L] -> [R, P]."""
        return sums(self.average, values)


@dataclass(frozen=True)
class IndexPlan:
    """The same for one hard route, by scatter and gather: costs no multiplications, but does not lower well."""

    route: Route
    mass: Tensor
    preserve_norm: bool = False

    def pool(self, x: Tensor) -> Tensor:
        mass = column(self.mass).to(x.dtype)
        mean = self._sum(x * mass) / self._sum(mass)
        return _with_norm(mean, x, self.matrix()) if self.preserve_norm else mean

    def copy(self, y: Tensor) -> Tensor:
        padded = torch.cat([torch.zeros_like(y[:, :1]), y], 1)
        return padded.gather(1, self._index(y.shape[-1]))

    def matrix(self) -> Tensor:
        return self.route.matrix()

    def total(self, size: Tensor) -> Tensor:
        return self._sum(column(size)).reshape(size.shape[0], -1)

    def _sum(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[0], self.route.keep + 1, x.shape[-1])
        return zeros.scatter_add(1, self._index(x.shape[-1]), x)[:, 1:]

    def _index(self, dim: int) -> Tensor:
        return self.route.slot.long().transpose(1, 2).expand(-1, -1, dim)


def column(x: Tensor) -> Tensor:
    """[B, N] -> [B, N, 1] as a view that every delegate takes."""
    return x.reshape(*x.shape, 1)


def flat(x: Tensor) -> Tensor:
    """[B, N, 1] -> [B, N]."""
    return x.reshape(x.shape[:-1])


def _with_norm(mean: Tensor, x: Tensor, share: Tensor) -> Tensor:
    wide = summable(x)
    norms = as_type(torch.sqrt((wide * wide) @ constant("ones", x.shape[-1], like=wide)), x.dtype)
    return unit(mean) * row_max(share * norms.transpose(1, 2))


def dense_plan(route: Route, mass: Tensor, preserve_norm: bool = False) -> DensePlan:
    """The plan of a route for tokens that count `mass` [R, L] each in their averages."""
    share = route.matrix()
    share = share if share.dtype == mass.dtype else share.to(mass.dtype)
    if is_short(share.shape[-1]):
        return DensePlan(share, averages(share, mass), preserve_norm)
    shares = share * mass.reshape(mass.shape[0], 1, -1)
    total = shares @ constant("ones", shares.shape[-1], like=shares)
    return DensePlan(share, shares / torch.clamp(total, min=1e-12), preserve_norm)


def sequence_plan(route: Route, mass: Tensor, preserve_norm: bool = False) -> DensePlan | IndexPlan:
    """Matrices where a graph is exported or a decision has a gradient; indices otherwise."""
    if torch.compiler.is_exporting() or route.soft is not None:
        return dense_plan(route, mass, preserve_norm)
    return IndexPlan(route, mass, preserve_norm)


@dataclass(frozen=True)
class GridPlan:
    """Rows, then columns, of an H x W grid; None where an axis keeps all its tokens.

    rows: lines [B * H * cuts, L]; columns: lines [B * W' * cuts, L]; cuts: tiles per column and per row.
    Tokens are in row-major order before and after; `turned`: merged ones in column-major order, which saves two turns of
    the map where what follows does not depend on the order.
    """

    grid: tuple[int, int]
    kept: tuple[int, int]
    cuts: tuple[int, int]
    rows: DensePlan | None
    columns: DensePlan | None
    turned: bool = False

    def pool(self, x: Tensor) -> Tensor:
        return self._down(x, DensePlan.pool)

    def total(self, size: Tensor) -> Tensor:
        """Sums over merged tokens of size [B, N]: [B, P]."""
        return self._numbers(size, DensePlan.total)

    def mean(self, values: Tensor) -> Tensor:
        """`pool` of one number a token: [B, N] -> [B, P]."""
        return self._numbers(values, DensePlan.mean)

    def _numbers(self, x: Tensor, step: Callable[[DensePlan, Tensor], Tensor]) -> Tensor:
        return flat(self._down(column(x), lambda plan, lines: column(step(plan, flat(lines)))))

    def _down(self, x: Tensor, step: Callable[[DensePlan, Tensor], Tensor]) -> Tensor:
        if self.rows is not None:
            x = unfold_lines(step(self.rows, fold_rows(x, self.grid, self.cuts[1])), x.shape[0])
        if self.columns is not None:
            lines = step(self.columns, fold_columns(x, (self.grid[0], self.kept[1]), self.cuts[0]))
            x = unfold_lines(lines, x.shape[0]) if self.turned else unfold_columns(lines, x.shape[0], self.kept)
        return x

    def copy(self, y: Tensor) -> Tensor:
        return self.copied(y, lambda tokens: tokens)

    def copied(self, y: Tensor, change: Change) -> Tensor:
        """copy(change(y)); tokens of rows are changed as lines, and not put together before."""
        if self.rows is None:
            return self._rows_of(change(y))
        changed = change(self._lines_of(y)) if self.columns is None else self._lines_of(change(y))
        return unfold_lines(self.rows.copy(changed), y.shape[0])

    def _lines_of(self, y: Tensor) -> Tensor:
        """Merged tokens [B, P, D] as lines of rows [B * H * cuts, W' / cuts, D]."""
        return fold_rows(self._rows_of(y), (self.grid[0], self.kept[1]), self.cuts[1])

    def _rows_of(self, y: Tensor) -> Tensor:
        """Merged tokens [B, P, D] with the tokens of each column copied back: [B, H * W', D]."""
        if self.columns is None:
            return y
        return unfold_columns(self.columns.copy(self._columns_of(y)), y.shape[0], (self.grid[0], self.kept[1]))

    def _columns_of(self, y: Tensor) -> Tensor:
        """Merged tokens [B, P, D] as lines [B * W' * cuts, H' / cuts, D]."""
        if not self.turned:
            return fold_columns(y, self.kept, self.cuts[0])
        return y.reshape(-1, self.kept[0] // self.cuts[0], y.shape[-1])

    def matrix(self) -> Tensor:
        """S [B, H' * W', H * W], for traces and tests."""
        if self.rows is not None:
            share, lines = self.rows.share, self.grid[0] * self.cuts[1]
        else:
            assert self.columns is not None
            share, lines = self.columns.share, self.grid[1] * self.cuts[0]
        ones = identity(self.kept[0] * self.kept[1], like=share).expand(share.shape[0] // lines, -1, -1)
        return self.copy(ones).transpose(1, 2)


@dataclass(frozen=True)
class PrefixPlan:
    """A plan for all tokens but the first `prefix`, which stay as they are."""

    prefix: int
    inner: GridPlan

    def pool(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.prefix], self.inner.pool(x[:, self.prefix :])], 1)

    def copy(self, y: Tensor) -> Tensor:
        return torch.cat([y[:, : self.prefix], self.inner.copy(y[:, self.prefix :])], 1)

    def total(self, size: Tensor) -> Tensor:
        return torch.cat([size[:, : self.prefix], self.inner.total(size[:, self.prefix :])], 1)

    def matrix(self) -> Tensor:
        inner = self.inner.matrix()
        return torch.stack([torch.block_diag(identity(self.prefix, like=one), one) for one in inner])


Plan = DensePlan | IndexPlan | GridPlan | PrefixPlan


def identity(count: int, like: Tensor) -> Tensor:
    """The matrix [count, count] that leaves tokens where they are, in the type and on the device of `like`."""
    return torch.eye(count, dtype=like.dtype, device=like.device)


def fold_rows(x: Tensor, grid: tuple[int, int], cuts: int) -> Tensor:
    """[B, H * W, D] -> lines [B * H * cuts, W / cuts, D]."""
    height, width = grid
    return x.reshape(x.shape[0] * height * cuts, width // cuts, x.shape[-1])


def unfold_lines(lines: Tensor, batch: int) -> Tensor:
    """Lines in row-major order back to [B, tokens, D]."""
    return lines.reshape(batch, -1, lines.shape[-1])


def fold_columns(x: Tensor, grid: tuple[int, int], cuts: int) -> Tensor:
    """[B, H * W, D] -> lines [B * W * cuts, H / cuts, D]."""
    height, width = grid
    turned = x.reshape(x.shape[0], height, width, x.shape[-1]).transpose(1, 2)
    return turned.reshape(x.shape[0] * width * cuts, height // cuts, x.shape[-1])


def unfold_columns(lines: Tensor, batch: int, grid: tuple[int, int]) -> Tensor:
    """Lines of columns of an H x W grid back to [B, H * W, D]."""
    height, width = grid
    turned = lines.reshape(batch, width, height, lines.shape[-1]).transpose(1, 2)
    return turned.reshape(batch, height * width, lines.shape[-1])

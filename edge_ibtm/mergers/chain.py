"""One merger after another at the same site, for example a merger followed by a pruner; and LTMP, which is such a pair."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..plan import dense_plan
from ..tokens import Route, bipartite, keep_top, similarity
from .base import Merger, Tokens
from .tome import TEMPERATURE, threshold_mask


def compose(first: Route, second: Route) -> Route:
    """The route that takes tokens through `first` and its outputs through `second`."""
    slot = second.slot @ Route(first.slot, first.keep).matrix()
    soft = None
    if first.soft is not None or second.soft is not None:
        product = second.matrix() @ first.matrix()
        soft = product - product.detach()
    return Route(slot, second.keep, soft)


def merged_lines(tokens: Tokens, route: Route) -> Tokens:
    """The tokens of each line after `route`: features, sizes and importance averaged by mass."""
    plan = dense_plan(route, tokens.mass())

    def pool(x: Tensor | None) -> Tensor | None:
        return None if x is None else plan.pool(x.unsqueeze(-1)).squeeze(-1)

    z = plan.pool(tokens.z)
    metric = z if tokens.metric is tokens.z else plan.pool(tokens.metric)
    return tokens.with_(
        z=z, metric=metric, size=plan.total(tokens.size), weight=None, masses=None, penalty=pool(tokens.penalty),
        importance=pool(tokens.importance),
    )  # fmt: skip


class Chain(Merger):
    """`first` removes half of what has to go, `second` the rest."""

    def __init__(self, first: Merger, second: Merger) -> None:
        super().__init__(0)
        self.first, self.second = first, second
        self.layouts = tuple(x for x in first.layouts if x in second.layouts)  # type: ignore[misc]
        self.needs = first.needs + second.needs  # type: ignore[misc]
        self.ignores_mean = first.ignores_mean and second.ignores_mean  # type: ignore[misc]

    def settle(self, *, first: bool, attention: bool, convolved: bool) -> None:
        self.first.settle(first=first, attention=attention, convolved=convolved)
        self.second.settle(first=first, attention=attention, convolved=convolved)

    def prepare(self, tokens: Tokens) -> Tokens:
        return self.second.prepare(self.first.prepare(tokens))

    def route(self, tokens: Tokens, keep: int) -> Route:
        length = tokens.size.shape[1]
        half = keep + (length - keep) // 2
        if half in (length, keep):
            return self.first.route(tokens, keep)
        first = self.first.route(tokens, half)
        return compose(first, self.second.route(merged_lines(tokens, first), keep))


class LTMP(Merger):
    """LTMP: Learned Thresholds Token Merging and Pruning, Bonnaerens and Dambre, arXiv 2307.10780, with a fixed count.

    Half of the tokens merge, then the least attended go (all of them merge where the site has no attention). Both
    decisions are straight-through against a learned threshold.
    """

    ignores_mean = True

    def __init__(self, dim: int, classes: int = 0) -> None:
        super().__init__(dim, classes)
        self.merge_threshold = nn.Parameter(torch.tensor(0.9))
        self.prune_threshold: nn.Parameter | None = nn.Parameter(torch.tensor(0.0))

    def settle(self, *, first: bool, attention: bool, convolved: bool) -> None:
        if not attention:
            self.prune_threshold = None

    def prepare(self, tokens: Tokens) -> Tokens:
        if tokens.received_attention is None:
            return tokens
        return tokens.with_(importance=tokens.received_attention())

    def route(self, tokens: Tokens, keep: int) -> Route:
        length = tokens.size.shape[1]
        prunes = tokens.importance is not None and keep + 1 < length
        half = keep + (length - keep) // 2 if prunes else keep
        scores = similarity(tokens.metric)
        soft = threshold_mask(scores, self.merge_threshold) if self.training else None
        first = bipartite(scores, half, prefix=tokens.prefix, ordered=tokens.ordered, soft=soft)
        return compose(first, self._prune(merged_lines(tokens, first), keep)) if prunes else first

    def _prune(self, tokens: Tokens, keep: int) -> Route:
        assert tokens.importance is not None and self.prune_threshold is not None
        scaled = tokens.importance * tokens.importance.shape[1]
        soft = torch.sigmoid((scaled - self.prune_threshold) / TEMPERATURE) if self.training else None
        return keep_top(scaled, keep, tokens.prefix, soft)

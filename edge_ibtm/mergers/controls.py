"""Controls: no merging, random merging, random dropping, uniform pooling. What a method has to beat."""

from __future__ import annotations

from ..constants import constant
from ..tokens import Route, bipartite, keep_top
from .base import Merger, Tokens


class Identity(Merger):
    """Keeps every token, whatever the keep ratio says."""

    ignores_mean = True


class RandomMerge(Merger):
    """Merges pairs drawn once, the same for every image (seeded by the length of the line)."""

    ignores_mean = True
    seed = 0

    def route(self, tokens: Tokens, keep: int) -> Route:
        lines, length, _ = tokens.metric.shape
        scores = constant("random", (length + 1) // 2, length // 2, self.seed, like=tokens.metric)
        return bipartite(scores.expand(lines, -1, -1), keep, prefix=tokens.prefix, ordered=tokens.ordered)


class RandomDrop(Merger):
    """Drops tokens drawn once, the same for every image."""

    ignores_mean = True
    seed = 0

    def route(self, tokens: Tokens, keep: int) -> Route:
        lines, length, _ = tokens.metric.shape
        scores = constant("random", length, 1, self.seed, like=tokens.metric)
        return keep_top(scores.expand(lines, -1, -1).reshape(lines, length), keep, tokens.prefix)


class UniformPool(Merger):
    """Averages runs of neighbours of as equal length as can be: what lowering the resolution inside the model does."""

    ignores_mean = True

    def route(self, tokens: Tokens, keep: int) -> Route:
        return even_runs(tokens, keep)


def even_runs(tokens: Tokens, keep: int) -> Route:
    """Runs of neighbours of as equal length as can be become one token each, the same runs in every line."""
    lines, length, _ = tokens.metric.shape
    slot = constant("pooled", length, keep, tokens.prefix, like=tokens.metric)
    return Route(slot.expand(lines, -1, -1), keep)

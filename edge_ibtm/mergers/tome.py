"""ToMe: Token Merging, Bolya et al., arXiv 2210.09461; and the same with LTMP's learned threshold mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..tokens import Route, bipartite, similarity
from .base import Merger, Tokens

TEMPERATURE = 0.1


def threshold_mask(scores: Tensor, threshold: Tensor) -> Tensor:
    """LTMP's straight-through probabilities (arXiv 2307.10780, eq. 5): sigmoid((best score - threshold) / tau), [R, a, 1]."""
    return torch.sigmoid((scores.amax(-1, keepdim=True) - threshold) / TEMPERATURE)


class ToMe(Merger):
    """Merges the most similar pairs; nothing is learned."""

    ignores_mean = True

    def route(self, tokens: Tokens, keep: int) -> Route:
        return bipartite(similarity(tokens.metric), keep, prefix=tokens.prefix, ordered=tokens.ordered)


class MaskedToMe(Merger):
    """ToMe whose decisions get a gradient from LTMP's learned threshold; the count stays fixed."""

    ignores_mean = True

    def __init__(self, dim: int, classes: int = 0) -> None:
        super().__init__(dim, classes)
        self.threshold = nn.Parameter(torch.tensor(0.9))

    def route(self, tokens: Tokens, keep: int) -> Route:
        scores = similarity(tokens.metric)
        soft = threshold_mask(scores, self.threshold) if self.training else None
        return bipartite(scores, keep, prefix=tokens.prefix, ordered=tokens.ordered, soft=soft)

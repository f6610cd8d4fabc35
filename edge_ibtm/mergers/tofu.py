"""ToFu: Token Fusion, Kim et al., arXiv 2312.01026: prune in early sites, merge with the norm preserved in late ones."""

from __future__ import annotations

from ..tokens import Route, bipartite, similarity
from .base import Tokens
from .tome import MaskedToMe, ToMe, threshold_mask

LATE = 0.5  # share of the depth from which tokens are merged instead of pruned


class ToFu(ToMe):
    """ToMe's pairs; the disappearing token is dropped early and averaged in, norm-preserving, late."""

    ignores_mean = False

    def route(self, tokens: Tokens, keep: int) -> Route:
        scores, early = similarity(tokens.metric), tokens.depth < LATE
        return bipartite(scores, keep, prefix=tokens.prefix, ordered=tokens.ordered, drop=early)

    def preserves_norm(self, tokens: Tokens) -> bool:
        return tokens.depth >= LATE


class MaskedToFu(MaskedToMe):
    """ToFu with LTMP's learned threshold mask."""

    ignores_mean = False

    def route(self, tokens: Tokens, keep: int) -> Route:
        scores = similarity(tokens.metric)
        soft = threshold_mask(scores, self.threshold) if self.training else None
        early = tokens.depth < LATE
        return bipartite(scores, keep, prefix=tokens.prefix, ordered=tokens.ordered, soft=soft, drop=early)

    def preserves_norm(self, tokens: Tokens) -> bool:
        return tokens.depth >= LATE

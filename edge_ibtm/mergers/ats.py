"""ATS: Adaptive Token Sampling, Fayyaz et al., arXiv 2111.15667, in a variant with a fixed count, so that it exports."""

from __future__ import annotations

import torch

from ..constants import constant
from ..tokens import Route, keep_top
from .base import Merger, Tokens


class ATS(Merger):
    """Inverse-transform sampling of the scores (class attention times the norm of the value, eq. 3).

    As published, a token hit by several samples counts once, so the number of tokens varies. Here the places left over
    go to the best-scored tokens that no sample hit.
    """

    layouts = ("sequence",)
    proportional = False
    ignores_mean = True
    needs = ("class_attention",)

    def prepare(self, tokens: Tokens) -> Tokens:
        assert tokens.class_attention is not None
        attention, value_norm = tokens.class_attention()
        return tokens.with_(importance=attention * value_norm)

    def route(self, tokens: Tokens, keep: int) -> Route:
        assert tokens.importance is not None
        scores = tokens.importance.detach()
        lines, length = scores.shape
        free = scores - scores * constant("head", length, tokens.prefix, like=scores)
        share = free / torch.clamp(free.sum(1, keepdim=True), min=1e-12)
        below = (share.reshape(lines, 1, length) @ constant("upto", length, like=share)).reshape(lines, length)
        samples = keep - tokens.prefix
        hits = torch.floor(below * float(samples) + 0.5) - torch.floor((below - share) * float(samples) + 0.5)
        return keep_top(share + torch.clamp(hits, 0.0, 1.0), keep, tokens.prefix)

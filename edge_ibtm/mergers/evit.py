"""EViT: Liang et al., arXiv 2202.07800: keep the tokens the class token attends to, fuse the rest into one."""

from __future__ import annotations

import torch

from ..tokens import Route, keep_top
from .base import Merger, Tokens


class EViT(Merger):
    """The `keep - 1` most attended tokens stay; the others become one token, weighted by attention, in the last slot.

    As published, an earlier fused token counts by its attention alone, however many tokens it stands for.
    """

    layouts = ("sequence",)
    proportional = False
    ignores_mean = True
    needs = ("class_attention",)

    def prepare(self, tokens: Tokens) -> Tokens:
        assert tokens.class_attention is not None
        attention, _ = tokens.class_attention()
        return tokens.with_(importance=attention, weight=attention.clamp_min(1e-6) / tokens.size)

    def route(self, tokens: Tokens, keep: int) -> Route:
        assert tokens.importance is not None
        slot = keep_top(tokens.importance, keep - 1, tokens.prefix).slot
        return Route(slot + float(keep) * torch.clamp(1.0 - slot, 0.0, 1.0), keep)

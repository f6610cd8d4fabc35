"""Swin's window attention on the map itself: queries, keys and values are cut into windows, the map never is.

A window's tokens are rearranged by heads anyhow, so one permutation of six axes does both; of timm's six permutations in
a block four are left, and no copy of the windows for the three layers that read them.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from edge_ibtm.rewrite import rewrite_modules
from edge_ibtm.rewrite_attention import SplitWindowAttention, attend, never_pads


def attention_on_maps(model: nn.Module) -> nn.Module:
    """`model`, prepared for export, with every Swin block in this form that needs no padding, in place.

    For delegates that take six axes.
    """
    return rewrite_modules(model, {SwinTransformerBlock: MapBlock.of})


class MapBlock(SwinTransformerBlock):
    """The equal of timm's block in eval mode whose map is a multiple of its windows."""

    @classmethod
    def of(cls, block: Any) -> nn.Module:
        """`block` in this form; others are returned as they are."""
        if type(block.attn) is SplitWindowAttention and never_pads(block):
            block.__class__ = cls
        return block  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """timm's own on a map [B, H, W, C] that stays one: tokens of it, and the map again, would each be a copy."""
        x = x + self._attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attn(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        attn: Any = self.attn
        batch, height, width, channels = x.shape
        (h, w), shift, heads = self.window_size, tuple(self.shift_size), attn.num_heads
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        dim = channels // heads
        cut = (batch * (height // h), h, width // w, w, heads, dim)
        q, k, v = (layer(x).reshape(cut).permute(0, 2, 4, 1, 3, 5).reshape(-1, h * w, dim) for layer in attn.layers())
        q, v = (t.reshape(-1, heads, h * w, dim) for t in (q, v))
        out = attend(q, k.transpose(1, 2), v, attn.masked(self.attn_mask, len(q)))
        out = out.reshape(cut[0], cut[2], heads, h, w, dim).permute(0, 3, 1, 4, 2, 5)
        out = attn.proj(out.reshape(x.shape))
        return torch.roll(out, shift, (1, 2)) if any(shift) else out

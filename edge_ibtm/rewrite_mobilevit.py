"""MobileViT's unfold and fold by permutations of few axes, no interpolation where none is needed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def unfold(x: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """A map [B, C, H, W] as tokens [B * p, n, C]: p places in a patch, n patches."""
    batch, dim, height, width = x.shape
    ph, pw = patch
    x = x.reshape(batch * dim, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3)
    x = x.reshape(batch, dim, ph * pw, -1)
    return x.permute(0, 2, 3, 1).reshape(batch * ph * pw, -1, dim)


def fold(tokens: torch.Tensor, patch: tuple[int, int], size: tuple[int, int, int]) -> torch.Tensor:
    """The inverse of `unfold`; size: (batch, height, width)."""
    batch, height, width = size
    ph, pw = patch
    dim = tokens.shape[-1]
    x = tokens.reshape(batch, ph * pw, -1, dim).permute(0, 3, 1, 2)
    x = x.reshape(batch * dim, ph, pw, height // ph, width // pw).permute(0, 3, 1, 4, 2)
    return x.reshape(batch, dim, height, width)


class OnePermuteBlock(nn.Module):
    """The equal of timm's MobileVitBlock, x [B, C, H, W] -> [B, C', H, W]."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv_kxk, self.conv_1x1, self.transformer = block.conv_kxk, block.conv_1x1, block.transformer
        self.norm, self.conv_proj, self.conv_fusion = block.norm, block.conv_proj, block.conv_fusion
        self.patch_size, self.patch_area = block.patch_size, block.patch_area

    @classmethod
    def of(cls, block: Any) -> nn.Module:
        return cls(block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv_1x1(self.conv_kxk(x))
        batch, _, height, width = y.shape
        ph, pw = self.patch_size
        rows, columns = math.ceil(height / ph) * ph, math.ceil(width / pw) * pw
        whole = (rows, columns) == (height, width)
        if not whole:
            y = F.interpolate(y, size=(rows, columns), mode="bilinear", align_corners=False)
        tokens = self.norm(self.transformer(unfold(y, self.patch_size)))
        y = fold(tokens, self.patch_size, (batch, rows, columns))
        if not whole:
            y = F.interpolate(y, size=(height, width), mode="bilinear", align_corners=False)
        y = self.conv_proj(y)
        return y if self.conv_fusion is None else self.conv_fusion(torch.cat((x, y), 1))

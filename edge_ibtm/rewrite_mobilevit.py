"""MobileViT's blocks: a map is cut into tokens by one permutation, 1 x 1 convolutions are linear layers of the tokens.

A map's channels stay together, so a permutation moves rows of memory; and it moves the narrow side of the 1 x 1 convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_ibtm.backbones.mobilevit import MergedMobileVitBlock
from edge_ibtm.rewrite_attention import SplitAttention, linear_of
from edge_ibtm.rewrite_conv import is_pointwise


def unfold(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """A map [B, C, H, W] as tokens [p * B, n, C]: p places in a patch, n patches."""
    batch, dim, height, width = x.shape
    ph, pw = patch
    x = x.permute(0, 2, 3, 1).reshape(batch * height // ph, ph, width // pw, pw, dim)
    return x.permute(1, 3, 0, 2, 4).reshape(ph * pw * batch, -1, dim)


def fold(tokens: Tensor, patch: tuple[int, int], size: tuple[int, int, int]) -> Tensor:
    """The inverse of `unfold`; size: (batch, height, width)."""
    batch, height, width = size
    ph, pw = patch
    x = tokens.reshape(ph, pw, batch * height // ph, width // pw, -1).permute(2, 0, 3, 1, 4)
    return x.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class OnePermuteBlock(nn.Module):
    """The equal of timm's MobileVitBlock, x [B, C, H, W] -> [B, C', H, W]."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv_kxk, self.conv_1x1, self.transformer = block.conv_kxk, block.conv_1x1, block.transformer
        self.norm, self.conv_proj, self.conv_fusion = block.norm, block.conv_proj, block.conv_fusion
        self.patch_size, self.on_tokens = block.patch_size, on_tokens(self)

    @classmethod
    def of(cls, block: Any) -> nn.Module:
        return cls(block)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_kxk(x)
        y = self._between(y) if self.on_tokens and _whole(y, self.patch_size) else self._between_maps(y)
        return y if self.conv_fusion is None else self.conv_fusion(torch.cat((x, y), 1))

    def _between(self, y: Tensor) -> Tensor:
        tokens = self.norm(self.transformer(self.conv_1x1(unfold(y, self.patch_size))))
        return fold(self.conv_proj(tokens), self.patch_size, (y.shape[0], y.shape[2], y.shape[3]))

    def _between_maps(self, y: Tensor) -> Tensor:
        """The same with convolutions of maps: of any kind, and of a map that is stretched where patches do not divide it."""
        y = self.conv_1x1(y)
        (batch, _, *size), whole = y.shape, _whole(y, self.patch_size)
        rows, columns = (-(-side // p) * p for side, p in zip(size, self.patch_size))
        if not whole:
            y = F.interpolate(y, size=(rows, columns), mode="bilinear", align_corners=False)
        tokens = self.norm(self.transformer(unfold(y, self.patch_size)))
        y = fold(tokens, self.patch_size, (batch, rows, columns))
        if not whole:
            y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
        return self.conv_proj(y)  # type: ignore[no-any-return]


class MergedOnTokens(MergedMobileVitBlock):
    """The equal of a MergedMobileVitBlock."""

    @classmethod
    def of(cls, block: Any) -> nn.Module:
        """`block` made one of these; itself if its convolutions or its attention are of another kind."""
        split = [attn for layer in block.transformer if type(attn := layer.attn) is SplitAttention]
        if len(split) == len(block.transformer) and on_tokens(block):
            block.__class__ = cls
            for attn in split:
                attn.sequences = block.patch_area
        return block  # type: ignore[no-any-return]

    def between(self, local: Tensor) -> Tensor:
        if not _whole(local, self.patch_size):
            return super().between(local)
        grid = local.shape[2] // self.patch_size[0], local.shape[3] // self.patch_size[1]
        pixels = self._unfold(local, grid)
        z = self.conv_1x1.linear(self._each(pixels)).reshape(*pixels.shape[:2], -1)  # type: ignore[operator, union-attr]
        y: Tensor = self.conv_proj(self._pixels(self._global(z, grid)))  # type: ignore[operator]
        return self._fold(self._patches(y), grid)

    def _pixels(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, N, area * C] -> [B, N * area, C], which the attention takes for one sequence a place."""
        batch, count, width = tokens.shape
        return tokens.reshape(batch, count * self.patch_area, width // self.patch_area)

    def _patches(self, pixels: Tensor) -> Tensor:
        """The inverse of `_pixels`."""
        batch, count, channels = pixels.shape
        return pixels.reshape(batch, count // self.patch_area, self.patch_area * channels)


class Pointwise(nn.Module):
    """A 1 x 1 Conv2d of maps [B, C, H, W], and its equal for tokens [B, n, C]."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.linear = conv, linear_of(conv.weight.detach().flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.ndim == 4 else self.linear(x)  # type: ignore[no-any-return]


def on_tokens(block: Any) -> bool:
    """Make a block's 1 x 1 convolutions take tokens too, in place; False if they, or what follows, are of another kind."""
    conv, proj = block.conv_1x1, block.conv_proj
    fits = is_pointwise(conv) and is_pointwise(proj.conv) and isinstance(proj.bn, (nn.SiLU, nn.ReLU, nn.Identity))
    if fits:
        block.conv_1x1, proj.conv = Pointwise(conv), Pointwise(proj.conv)
    return fits


def _whole(x: Tensor, patch: tuple[int, int]) -> bool:
    """Whether patches divide a map [B, C, H, W]."""
    return x.shape[2] % patch[0] == 0 and x.shape[3] % patch[1] == 0

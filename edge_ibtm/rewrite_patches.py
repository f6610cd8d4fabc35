"""A vision transformer's patches as one product: a convolution whose stride is its kernel reads every pixel once.

Cutting the map moves whole runs of pixels, and XNNPACK's matrix product is faster than its convolution (on AVX2 threefold).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import nn


class LinearPatches(nn.Module):
    """The equal of a timm PatchEmbed whose output has channels last: [B, C, H, W] -> [B, h * w, D] or [B, h, w, D]."""

    dynamic_img_pad = False
    dynamic_feat_size = PatchEmbed.dynamic_feat_size  # timm's `forward_intermediates` asks for it

    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.patch_size, self.img_size, self.grid_size = embed.patch_size, embed.img_size, embed.grid_size
        self.strict, self.as_map = embed.strict_img_size, not embed.flatten
        self.norm = embed.norm
        self.weight = nn.Parameter(embed.proj.weight.detach().flatten(1))
        self.bias = embed.proj.bias

    @classmethod
    def of(cls, embed: Any) -> nn.Module:
        """The equal of a PatchEmbed whose patches fill the image; others are returned as they are."""
        proj, size = embed.proj, tuple(embed.patch_size)
        known = embed.img_size is not None and not embed.dynamic_img_pad
        fills = known and not any(side % step for side, step in zip(embed.img_size, size))  # timm's leaves the rest out
        cuts = fills and type(proj) is nn.Conv2d and proj.kernel_size == proj.stride == size
        plain = cuts and (*proj.padding, *proj.dilation, proj.groups) == (0, 0, 1, 1, 1)
        last = embed.flatten or str(getattr(embed.output_fmt, "value", embed.output_fmt)) == "NHWC"
        return cls(embed) if plain and last else embed

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sides, (height, width) = tuple(x.shape[2:]), self.patch_size
        if sides[0] % height or sides[1] % width or (self.strict and sides != tuple(self.img_size)):
            raise ValueError(f"images of {sides} pixels do not fit patches of {self.patch_size}, image size {self.img_size}")
        rows, columns = sides[0] // height, sides[1] // width
        lead = (len(x),) if len(x) > 1 else ()  # Core ML takes five axes at most
        cut = x.reshape(*lead, x.shape[1], rows, height, columns, width)
        cut = cut.permute(*range(len(lead)), *(len(lead) + axis for axis in (1, 3, 0, 2, 4)))
        shape = (rows, columns) if self.as_map else (rows * columns,)
        return self.norm(F.linear(cut.reshape(len(x), *shape, -1), self.weight, self.bias))

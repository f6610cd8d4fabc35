"""Convolutions as matrix products, for x86 with AVX2 and no AVX-512.

There ExecuTorch's wheel (1.5.1) keeps one accumulator of XNNPACK's float convolution on the stack: 16 GMAC/s on one
core of a Zen 3 where the matrix product makes 40. Other CPUs run other kernels, or compute 256 bits in two halves (Zen 1):
there the copies made here only cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edge_ibtm.rewrite import prepare_for_export, rewrite_modules

MIN_CHANNELS = 32  # from 24 to 24 channels the copies cost what the products save (Zen 3)


def convolutions_as_products(model: nn.Module) -> nn.Module:
    """A rewritten copy of an eager `model` whose dense convolutions of stride 1 are products; equal up to rounding."""
    return rewrite_modules(prepare_for_export(model), {nn.Conv2d: ProductConv.of})


class ProductConv(nn.Module):
    """The equal of a Conv2d of stride 1, [B, C, H, W] -> [B, C', H', W'], as one 1 x 1 convolution a row of its kernel.

    The map shifted to each column of the kernel is joined to a map of C * columns channels; each row is a product with
    as much of that as it sees, and the rows' products are summed.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        above, left = (int(side) for side in conv.padding)
        self.padding = (left, left, above, above)
        self.columns = conv.kernel_size[1]
        weight = conv.weight.detach().permute(2, 0, 3, 1)  # [rows, C', columns, C]
        self.rows = nn.ParameterList(row.reshape(conv.out_channels, -1, 1, 1) for row in weight)
        self.bias = conv.bias

    @classmethod
    def of(cls, conv: nn.Module) -> nn.Module:
        """`conv` as products; itself if it is grouped, strided, dilated, of one pixel or of few channels."""
        assert isinstance(conv, nn.Conv2d)
        simple = conv.groups == 1 and conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        pays = max(conv.kernel_size) > 1 and conv.in_channels >= MIN_CHANNELS
        return cls(conv) if simple and pays and not isinstance(conv.padding, str) else conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, self.padding)
        height, width = x.shape[2] - len(self.rows) + 1, x.shape[3] - self.columns + 1
        x = torch.cat([x[..., i : i + width] for i in range(self.columns)], 1)
        total = F.conv2d(x[:, :, :height], self.rows[0], self.bias)
        for i, row in enumerate(self.rows[1:], 1):
            total = total + F.conv2d(x[:, :, i : i + height], row)
        return total

"""3 x 3 convolutions with four ninths of their multiplications: Winograd's F(2 x 2, 3 x 3).

Source: Lavin & Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308), section 4.1. XNNPACK has no
such kernel, so it is written in operators that it has: the transform of the map as depthwise convolutions, sixteen
1 x 1 convolutions (matrix products) on maps of half the sides, additions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edge_ibtm.rewrite import rewrite_modules

MIN_CHANNELS = 48  # with 32 the transforms cost what the products save (emulated Arm)
MIN_PLACES = 128  # height * width; on smaller maps little is saved for weights of 16/9 the size

_MAP = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])  # B^T of the paper's equation 8
_KERNEL = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)  # G


def winograd(model: nn.Module) -> nn.Module:
    """`model` with every 3 x 3 convolution that gains by it in Winograd's form, in place; equal up to rounding."""
    return rewrite_modules(model, {nn.Conv2d: WinogradConv.of})


class WinogradConv(nn.Module):
    """The equal of a dense 3 x 3 Conv2d of stride 1 and padding 1, [B, C, H, W] -> [B, C', H, W].

    lines: 4 depthwise kernels [C, 1, 4, 1]; products: 16 kernels [C', C, 1, 1].
    Maps with an odd side, or of fewer than MIN_PLACES, go through the convolution itself.
    """

    lines: torch.Tensor
    products: torch.Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        weight = conv.weight.detach()
        self.register_buffer("lines", _MAP.to(weight)[:, None, None, :, None].repeat(1, conv.in_channels, 1, 1, 1))
        products = torch.einsum("ir,ocrs,js->ijoc", _KERNEL, weight.double(), _KERNEL).to(weight)
        self.register_buffer("products", products.flatten(0, 1)[..., None, None])

    @classmethod
    def of(cls, conv: nn.Module) -> nn.Module:
        """`conv` in Winograd's form; itself if it is of another kind or has few channels."""
        assert isinstance(conv, nn.Conv2d)
        kind = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
        fits = kind == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
        return cls(conv) if fits and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS else conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        if height % 2 or width % 2 or height * width < MIN_PLACES:
            return self.conv(x)  # type: ignore[no-any-return]
        rows = [F.conv2d(x, line, None, (2, 1), (1, 0), 1, channels) for line in self.lines]
        places = [F.conv2d(row, line.mT, None, (1, 2), (0, 1), 1, channels) for row in rows for line in self.lines]
        biases = [self.conv.bias if k == 5 else None for k in range(16)]  # the one that all four places hold once
        m = [F.conv2d(*given) for given in zip(places, self.products, biases)]
        columns = [_halves(m[j::4]) for j in range(4)]
        out = torch.cat([half for i in range(2) for half in _halves([column[i] for column in columns])])
        out = out.permute(0, 2, 3, 1).reshape(2, 2, batch * height // 2, width // 2, -1).permute(2, 0, 3, 1, 4)
        return out.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def _halves(m: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A^T m: what four products in a line give for its first and its second place."""
    inner = m[1] + m[2]
    return m[0] + inner, m[1] - m[2] - m[3]

"""LayerNorm whose means are products with a constant row.

XNNPACK takes no mean over the last axis, but it takes a linear layer: mean(x) = x @ (1/D, ..., 1/D).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edge_ibtm.short_lines import as_type, summable


class MeanFreeNorm(nn.LayerNorm):
    """An nn.LayerNorm over one axis whose inputs [..., D] have mean zero (see `rewrite_stream`)."""

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> MeanFreeNorm:
        """`norm`, said to have such inputs."""
        made = cls(norm.normalized_shape, norm.eps, elementwise_affine=False)
        made.weight, made.bias = norm.weight, norm.bias
        return made.train(norm.training)


class Mean(nn.Module):
    """The mean [..., 1] of x [..., D], in x's dtype and on its device."""

    row: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("row", torch.full((1, dim), 1.0 / dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fits = self.row.dtype == x.dtype and self.row.device == x.device  # else the graph would hold a conversion
        return F.linear(x, self.row if fits else torch.full_like(self.row, 1.0 / x.shape[-1], dtype=x.dtype, device=x.device))


class Centred(nn.Module):
    """x [..., D] less its mean over the last axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = Mean(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.mean(x)  # type: ignore[no-any-return]


class LinearNorm(nn.Module):
    """(x - mean) * rsqrt(variance + eps) * weight + bias over the last axis of x [..., D].

    mean_free: x has mean zero already.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self, dim: int, eps: float, weight: torch.Tensor | None, bias: torch.Tensor | None, mean_free: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.mean_free = dim, eps, mean_free
        self.mean = Mean(dim)
        self.register_buffer("weight", None if weight is None else weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def of(cls, norm: Any) -> nn.Module:
        """The equal of an nn.LayerNorm over one axis; others are returned as they are."""
        if len(norm.normalized_shape) != 1:
            return norm
        return cls(norm.normalized_shape[0], norm.eps, norm.weight, norm.bias, isinstance(norm, MeanFreeNorm))

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, mean_free={self.mean_free}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x if self.mean_free else x - self.mean(x)
        wide = summable(centred)
        normed = centred * as_type(torch.rsqrt(self.mean(wide * wide) + self.eps), x.dtype)
        if self.weight is not None:
            normed = normed * self.weight
        return normed if self.bias is None else normed + self.bias


class PooledGroupNorm(nn.Module):
    """The equal of a group norm with one group on maps x [B, C, H, W], its means as the delegate's pooling."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("weight", norm.weight.detach().reshape(1, -1, 1, 1))
        self.register_buffer("bias", norm.bias.detach().reshape(1, -1, 1, 1))

    @classmethod
    def of(cls, norm: Any) -> nn.Module:
        """The equal of an affine one-group nn.GroupNorm; others are returned as they are."""
        return cls(norm) if norm.num_groups == 1 and norm.affine else norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(x.shape[0], 1, x.shape[1], -1)
        centred = flat - flat.mean((2, 3), keepdim=True)
        variance = (centred * centred).mean((2, 3), keepdim=True)
        return (centred * torch.rsqrt(variance + self.eps)).reshape(x.shape) * self.weight + self.bias

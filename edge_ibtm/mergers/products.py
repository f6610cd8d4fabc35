"""LayerNormed tokens in an exported graph, where a mask needs only their products and never writes them out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..constants import constant
from ..short_lines import as_type
from ..tokens import group_mean
from .base import Squares


class NormProducts:
    """Products of scale (x - mean), the LayerNorm without affine part of tokens x [B, N, D], taken from x itself.

    A product with a vector is scale <x, vector - its mean>; the variance is |x|^2 / D - mean^2. Three passes over all
    features are saved where something else needs the squares |x|^2 [B, N] anyhow.
    """

    def __init__(self, x: Tensor, squares: Squares, eps: float, vector: Tensor | None = None) -> None:
        """vector [1, D]: one that does not depend on x; its products [B, N] are taken with the mean, as `of_vector`."""
        batch, count, width = x.shape
        self.x, self.row = x, constant("sizes", 1, width, like=x) / width
        rows = self.row if vector is None else torch.cat([self.row, centred(vector, self.row)])
        products = [F.linear(x, rows)]
        if vector is not None:  # picked by products, in XNNPACK half the time of slices
            products = [products[0] @ constant("column", 2, i, like=x) for i in (0, 1)]
        spread = squares(1.0 / width, eps)
        mean = as_type(products[0].reshape(batch, count), spread.dtype)
        self.scale = as_type(torch.rsqrt(torch.clamp(spread - mean * mean, min=eps)), x.dtype)
        self.of_vector = None if vector is None else products[1].reshape(batch, count) * self.scale

    def mean(self, mass: Tensor) -> Tensor:
        """The mean [B, D] of all tokens, each times its mass [B, N]."""
        batch, count, width = self.x.shape
        parts = (mass * self.scale).reshape(batch, count, 1) * self.x
        return centred(group_mean(parts.reshape(batch, 1, count, width)).reshape(batch, width), self.row)

    def along(self, v: Tensor, factor: Tensor) -> Tensor:
        """Products [B, N] with one vector of mean zero an image, v [B, D], times a factor [], a constant."""
        return with_vector(self.x, v * factor) * self.scale


def with_vector(x: Tensor, v: Tensor) -> Tensor:
    """Products [B, N] of tokens x [B, N, D] with a vector each, v [B, D].

    The tokens are the second factor: XNNPACK's kernels fill their columns with them, and would leave all but one empty.
    """
    batch, count, width = x.shape
    return (v.reshape(batch, 1, width) @ x.transpose(1, 2)).reshape(batch, count)


def centred(v: Tensor, row: Tensor) -> Tensor:
    """v [n, D] less its mean; row [1, D] of 1 / D."""
    return v - F.linear(v, row)

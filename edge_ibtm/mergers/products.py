"""LayerNormed tokens in an exported graph, where a mask needs only their products and never writes them out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..constants import constant


class NormProducts:
    """Products of scale (x - mean), the LayerNorm without affine part of tokens x [B, N, D], taken from x itself.

    A product with a vector is scale <x, vector - its mean>; the variance is |x|^2 / D - mean^2. That saves three passes
    over all features, and two where the tokens' squares [B, N] and a vector known beforehand come along.
    """

    def __init__(self, x: Tensor, eps: float, squares: Tensor | None = None, vector: Tensor | None = None) -> None:
        """vector [D]: one that does not depend on x; its product is taken with the mean, as `of_vector` [B, N]."""
        batch, count, width = x.shape
        self.x, self.row = x, constant("sizes", 1, width, like=x) / width
        if squares is None:
            squares = ((x * x) @ constant("ones", width, like=x)).reshape(batch, count)
        if vector is None:
            mean, of_vector = F.linear(x, self.row).reshape(batch, count), None
        else:
            both = F.linear(x, torch.cat([self.row, centred(vector.reshape(1, width), self.row)]))
            # picked by products, in XNNPACK half the time of slices
            mean, of_vector = ((both @ constant(kind, 2, like=x)).reshape(batch, count) for kind in ("first", "second"))
        self.scale = torch.rsqrt(torch.clamp(squares * (1.0 / width) - mean * mean, min=0.0) + eps)
        self.of_vector = None if of_vector is None else of_vector * self.scale

    def total(self, mass: Tensor) -> Tensor:
        """The tokens' sum with mass [B, N]: [B, D]."""
        batch, count, width = self.x.shape
        shares = (mass * self.scale).reshape(batch, 1, count)
        return centred((shares @ self.x).reshape(batch, width), self.row)

    def along(self, v: Tensor) -> Tensor:
        """Products [B, N] with one vector an image, v [B, D]."""
        batch, count, width = self.x.shape
        products = (self.x * centred(v, self.row).reshape(batch, 1, width)) @ constant("ones", width, like=v)
        return products.reshape(batch, count) * self.scale


def centred(v: Tensor, row: Tensor) -> Tensor:
    """v [n, D] less its mean; row [1, D] of 1 / D."""
    return v - F.linear(v, row)

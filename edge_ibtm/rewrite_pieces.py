"""Large linear layers in pieces whose weights stay in a near cache.

XNNPACK's matrix product goes through all weights for every 5 to 7 rows of its input. Weights that do not fit into the
caches at hand come from further out each time; pieces that fit come from there once, however many rows there are.
"""

from __future__ import annotations

from typing import Any

import torch
from timm import layers
from torch import nn

from edge_ibtm.rewrite import rewrite_modules
from edge_ibtm.rewrite_attention import cut, linear_of

LARGEST = 2560 * 1024  # bytes of weights: smaller pieces gain with one thread, on one host (docs/LOG.md, 2026-12-01)
MOST = 16  # pieces of a layer: each costs operators
FEW_ROWS = 8  # up to so many the weights are gone through once or twice
ELEMENTWISE = (nn.GELU, nn.SiLU, nn.ReLU)


def in_pieces(model: nn.Module) -> nn.Module:
    """`model` with its large linear layers cut, in place; equal up to rounding."""
    model = rewrite_modules(model, {layers.Mlp: MlpInPieces.of})
    return rewrite_modules(model, {nn.Linear: LinearInPieces.of})


def pieces(layer: nn.Linear) -> int:
    """The least number of equal parts of a layer's outputs that fit, at most MOST; 1 for a layer that fits whole."""
    weights = layer.weight.numel() * layer.weight.element_size()
    if weights <= LARGEST:
        return 1
    counts = [n for n in range(2, MOST + 1) if layer.out_features % n == 0]
    return next((n for n in counts if weights <= n * LARGEST), max(counts, default=1))


class LinearInPieces(nn.Module):
    """The equal of a Linear, [..., C] -> [..., C'], its outputs made piece by piece and joined."""

    def __init__(self, whole: nn.Linear, count: int) -> None:
        super().__init__()
        self.whole, self.parts = whole, nn.ModuleList(cut(whole, count))

    @classmethod
    def of(cls, layer: Any) -> nn.Module:
        """`layer` in pieces, itself where it fits."""
        count = pieces(layer)
        return layer if count == 1 else cls(layer, count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() <= FEW_ROWS * x.shape[-1]:
            return self.whole(x)  # type: ignore[no-any-return]
        return torch.cat([part(x) for part in self.parts], -1)


class MlpInPieces(nn.Module):
    """The equal of a timm Mlp, [..., C] -> [..., C']: its hidden channels go piece by piece through both layers."""

    def __init__(self, mlp: Any, count: int) -> None:
        super().__init__()
        self.first, self.act = nn.ModuleList(cut(mlp.fc1, count)), mlp.act
        weights, biases = mlp.fc2.weight.detach().chunk(count, 1), [mlp.fc2.bias] + [None] * (count - 1)
        self.last = nn.ModuleList(linear_of(w.clone(), b) for w, b in zip(weights, biases))

    @classmethod
    def of(cls, mlp: Any) -> nn.Module:
        """`mlp` in pieces, itself where it fits or does more than two linear layers and what is between them."""
        plain = type(mlp.fc1) is type(mlp.fc2) is nn.Linear and type(mlp.act) in ELEMENTWISE
        still = all(isinstance(part, nn.Identity) for part in (mlp.drop1, mlp.norm, mlp.drop2))
        count = pieces(mlp.fc1) if plain and still else 1
        return mlp if count == 1 else cls(mlp, count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [last(self.act(first(x))) for first, last in zip(self.first, self.last)]
        return sum(outputs[1:], outputs[0])

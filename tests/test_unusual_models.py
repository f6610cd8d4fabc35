"""Models that are nearly what a family knows: right, or refused, never silently something else."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import edge_ibtm
from edge_ibtm.errors import UsageError
from edge_ibtm.rewrite import export_rewritten
from edge_ibtm.surgery import sites_of


class LowRank(nn.Linear):
    """A linear layer with a branch of its own, as LoRA adds."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features)
        self.load_state_dict(old.state_dict())
        self.a = nn.Parameter(torch.randn(old.in_features, 4) * 0.1)
        self.b = nn.Parameter(torch.randn(4, old.out_features) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (x @ self.a) @ self.b


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10).eval()


@pytest.mark.parametrize(("part", "layer"), [("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")])
def test_layers_with_arithmetic_of_their_own_are_kept(part: str, layer: str) -> None:
    model, x = vit(), torch.randn(1, 3, 64, 64)
    for block in model.blocks:
        setattr(getattr(block, part), layer, LowRank(getattr(getattr(block, part), layer)))
    with torch.no_grad():
        assert torch.allclose(export_rewritten(model, (x,)).module()(x), model(x), atol=1e-4)


def test_a_refused_call_leaves_the_sites() -> None:
    model = edge_ibtm.insert_mergers(vit(), keep_ratio=0.7)
    before = list(sites_of(model))
    with pytest.raises(UsageError, match="keep ratio 1.5"):
        edge_ibtm.insert_mergers(model, keep_ratio=1.5)
    assert list(sites_of(model)) == before != []


def test_a_model_without_a_place_for_sites_is_refused() -> None:
    with pytest.raises(UsageError, match="EfficientVitLarge has no place for a merge site"):
        edge_ibtm.insert_mergers(timm.create_model("efficientvit_l1", num_classes=10))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sites_take_the_models_type(dtype: torch.dtype) -> None:
    model = edge_ibtm.insert_mergers(vit().to(dtype), merger="ibtm")
    assert model(torch.randn(1, 3, 64, 64, dtype=dtype)).dtype is dtype

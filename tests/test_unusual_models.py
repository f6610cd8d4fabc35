"""Models that are nearly what a family knows: right, or refused, never silently something else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.mobilevit import MobileVitBlock
from torch import nn
from torch.nn.utils import prune

import edge_ibtm
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.errors import UsageError
from edge_ibtm.rewrite import export_rewritten, prepare_for_export
from edge_ibtm.surgery import sites_of
from edge_ibtm.tokens import similarity


class LowRank(nn.Linear):
    """A linear layer with a branch of its own, as LoRA adds."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features, old.bias is not None)
        self.load_state_dict(old.state_dict())
        self.a = nn.Parameter(torch.randn(old.in_features, 4) * 0.1)
        self.b = nn.Parameter(torch.randn(4, old.out_features) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (x @ self.a) @ self.b


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{"img_size": 64, "depth": 2, "num_classes": 10, **options}).eval()


def shaken(model: Any) -> Any:
    """The same model, its scales and shifts not those that timm starts with."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def sqnr(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Signal to noise in dB."""
    return float(10 * torch.log10(wanted.square().sum() / ((wanted - got).square().sum() + 1e-30)))


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


@pytest.mark.parametrize("again", [0, 1], ids=["first-and-last", "neighbours"])
@pytest.mark.parametrize("merger", [None, "tome"])
def test_a_block_that_stands_at_two_places(again: int, merger: str | None) -> None:
    model = shaken(vit(depth=3, global_pool="token"))
    model.blocks[2] = model.blocks[again]
    apart = copy.deepcopy(model)
    apart.blocks[2] = copy.deepcopy(apart.blocks[again])
    if merger:
        for each in (model, apart):
            edge_ibtm.insert_mergers(each, merger=merger, density="block")
        assert len(model.blocks) == 3 and len(model.blocks[:3]) == 3
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = apart(x)
        assert torch.equal(model(x), expected)
        assert sqnr(expected, prepare_for_export(model)(x)) >= 100
        assert torch.equal(edge_ibtm.remove_mergers(model)(x), edge_ibtm.remove_mergers(apart)(x))


@pytest.mark.parametrize("part", ["norm1", "mlp", "attn"])
def test_a_part_that_two_blocks_share(part: str) -> None:
    model, x = shaken(vit(depth=2)), torch.randn(1, 3, 64, 64)
    setattr(model.blocks[1], part, getattr(model.blocks[0], part))
    with torch.no_grad():
        assert sqnr(model(x), prepare_for_export(model)(x)) >= 100


@torch.no_grad()
def test_a_mobilevit_block_that_stands_at_two_places_merges_at_both() -> None:
    model, side = BACKBONES["mobilevit"].twin()
    stage = next(s for s in model.stages if isinstance(s[-1], MobileVitBlock))
    stage.append(stage[-1])
    x = torch.randn(1, 3, side, side)
    before, expected = len(list(stage)), model(x)
    edge_ibtm.insert_mergers(model, merger="tome")
    assert len(edge_ibtm.merge_trace(model, x)) == len(sites_of(model)) + 1
    assert sqnr(model(x), prepare_for_export(model)(x)) >= 100
    edge_ibtm.remove_mergers(model)
    assert len(list(stage)) == before and torch.equal(model(x), expected)


@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
@pytest.mark.parametrize(
    ("family", "density"), [(name, density) for name, family in BACKBONES.items() for density in family.densities]
)
def test_checkpointed_gradients_are_the_gradients(family: str, density: str, features: bool) -> None:
    torch.manual_seed(0)
    model, side = BACKBONES[family].twin()
    edge_ibtm.insert_mergers(model, merger="ibtm", density=density)  # in eval mode: statistics of a batch count once
    images = torch.randn(2, 3, side, side)
    found = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        outputs = model.forward_intermediates(images, intermediates_only=True) if features else [model(images)]
        sum(y.square().sum() for y in outputs).backward()  # type: ignore[union-attr]
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() and len(plain) > 20
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("exporting", [False, True])
@pytest.mark.parametrize("merger", ["tome", "tofu", "ibtm"])
def test_large_activations_in_half_precision(merger: str, exporting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """|token|^2 is beyond float16 here."""
    torch.manual_seed(0)
    model, side = BACKBONES["mobilevit"].twin()
    for module in model.modules():
        if isinstance(module, MobileVitBlock):
            module.conv_1x1.weight *= 100
    edge_ibtm.insert_mergers(model, merger=merger)
    x = torch.randn(1, 3, side, side)
    expected, half = model(x), model.half()
    if exporting:
        half = prepare_for_export(half)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # lines are compared as in an exported graph
    assert sqnr(expected, half(x.half()).float()) > 50


def test_zero_tokens_in_half_precision_are_not_alike() -> None:
    x = torch.cat([torch.zeros(1, 2, 8), torch.ones(1, 2, 8)], 1).half()
    assert similarity(x).tolist() == [[[0, 0], [0, 1]]]


@pytest.mark.parametrize("path", ["patch_embed", "blocks.0", "blocks.0.norm1", "blocks.1.attn.qkv", "norm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_parts_are_not_lost_silently(path: str, kind: str) -> None:
    model, x = vit(), torch.randn(1, 3, 64, 64)
    handle = getattr(model.get_submodule(path), kind)(lambda *_: None)
    with pytest.raises(UsageError, match=f"^{path} .* cannot be rewritten for export: its forward hook .* would be lost"):
        prepare_for_export(model)
    handle.remove()
    prepare_for_export(model)(x)


@torch.no_grad()
def test_a_hook_on_the_model_itself_is_kept() -> None:
    model, x = vit(), torch.randn(1, 3, 64, 64)
    model.register_forward_hook(lambda _m, _i, out: out * 2 + 1)
    assert sqnr(model(x), prepare_for_export(model)(x)) >= 100


@pytest.mark.parametrize(
    ("family", "density", "path"),
    [
        ("vit", "once", "blocks"), ("vit", "once", "blocks.0"), ("swin", "stage", "layers.1.blocks.0"),
        ("mobilevit", "stage", "stages.2.1"), ("mobilevit", "block", "stages.1.1.transformer.2"),
        ("efficientvit", "stage", "stages.3.blocks.1.local_module"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("macs", [None, 0.9])
def test_hooks_that_merging_would_lose_are_refused(family: str, density: str, path: str, macs: float | None) -> None:
    model, side = BACKBONES[family].twin()
    handle = model.get_submodule(path).register_forward_hook(lambda *_: None)
    before = str(model)
    with pytest.raises(UsageError, match=f"a forward hook on {type(model.get_submodule(path)).__name__} would be lost"):
        edge_ibtm.insert_mergers(model, merger="tome", density=density, macs=macs, img_size=side)
    assert str(model) == before
    handle.remove()
    edge_ibtm.insert_mergers(model, merger="tome", density=density)


def test_a_hook_on_a_block_that_stays_whole_is_kept() -> None:
    model, seen = vit(), []
    model.blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    edge_ibtm.insert_mergers(model, merger="tome", density="once")(torch.randn(1, 3, 64, 64))
    assert seen == [12]


def test_pruned_layers_name_what_to_call_first() -> None:
    model, x = edge_ibtm.insert_mergers(vit(), merger="tome"), torch.randn(1, 3, 64, 64)
    prune.l1_unstructured(model.get_submodule("blocks.0.mlp.fc1"), "weight", 0.3)
    expected = model(x).detach()
    with pytest.raises(UsageError, match=r"blocks.0.mlp.fc1 .* first call torch.nn.utils.prune.remove\(layer, 'weight'\)"):
        prepare_for_export(model)
    prune.remove(model.get_submodule("blocks.0.mlp.fc1"), "weight")
    assert sqnr(expected, prepare_for_export(model)(x).detach()) >= 100


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_weights_made_by_a_hook_name_what_to_call_first(norm: str) -> None:
    model = vit()
    getattr(torch.nn.utils, norm)(model.blocks[0].attn.qkv)
    with pytest.raises(UsageError, match=rf"blocks.0.attn.qkv .* first call torch.nn.utils.remove_{norm}\(layer\)"):
        prepare_for_export(model)


@torch.no_grad()
@pytest.mark.parametrize("merger", [None, "ibtm"])
@pytest.mark.parametrize("family", BACKBONES)
def test_parametrized_layers_are_kept(family: str, merger: str | None) -> None:
    torch.manual_seed(0)
    model, side = BACKBONES[family].twin()
    shaken(model)
    for layer in [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]:
        torch.nn.utils.parametrizations.weight_norm(layer)
    if merger:
        edge_ibtm.insert_mergers(model, merger=merger)
    x = torch.randn(1, 3, side, side)
    assert sqnr(model(x), prepare_for_export(model)(x)) >= 100


@torch.no_grad()
def test_swins_reduction_with_arithmetic_of_its_own_is_kept() -> None:
    model, side = BACKBONES["swin"].twin()
    merging = shaken(model).layers[1].downsample
    merging.reduction = LowRank(merging.reduction)
    x = torch.randn(1, 3, side, side)
    assert sqnr(model(x), prepare_for_export(model)(x)) >= 100


@torch.no_grad()
def test_a_grid_follows_set_input_size() -> None:
    options = {"merger": "tome", "layout": "grid"}
    early = edge_ibtm.insert_mergers(vit(), **options)  # type: ignore[arg-type]
    early.set_input_size((32, 128))
    late = vit()
    late.set_input_size((32, 128))
    edge_ibtm.insert_mergers(late, **options)  # type: ignore[arg-type]
    x = torch.randn(1, 3, 32, 128)
    assert torch.equal(early(x), late(x)) and early.state_dict().keys() == late.state_dict().keys()
    twin = copy.deepcopy(early)
    early.set_input_size((64, 64))
    assert torch.equal(twin(x), late(x)), "a copy has a grid of its own"


def test_a_grid_of_any_size_is_refused() -> None:
    model = vit(dynamic_img_size=True)
    with pytest.raises(UsageError, match="takes images of any size .* use layout='sequence'"):
        edge_ibtm.insert_mergers(model, merger="tome", layout="grid")
    edge_ibtm.insert_mergers(model, merger="tome")
    assert model(torch.randn(1, 3, 32, 96)).shape == (1, 10)

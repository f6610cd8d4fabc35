"""MAC counts against published figures, and the account by shapes against the counter."""

from __future__ import annotations

import pytest
import timm
from torch import nn

import edge_ibtm
from edge_ibtm.backbones import BACKBONES, family_of
from edge_ibtm.errors import UsageError
from edge_ibtm.macs import analytic_macs, transformer_block_macs
from edge_ibtm.surgery import schedule


@pytest.mark.parametrize(
    ("name", "side", "giga"),
    [
        ("mobilevit_xs", 224, 0.772), ("mobilevit_xs", 256, 1.026), ("mobilevit_s", 224, 1.522),
        ("mobilevit_s", 256, 2.001), ("efficientvit_b1", 224, 0.519), ("efficientvit_b1", 288, 0.856),
        ("swin_tiny_patch4_window7_224", 224, 4.491), ("swin_small_patch4_window7_224", 224, 8.741),
        ("swin_base_patch4_window7_224", 224, 15.431), ("deit_small_patch16_224", 224, 4.599),
        ("vit_base_patch16_224", 224, 17.564),
    ],
)  # fmt: skip
def test_base_models_cost_what_is_published(name: str, side: int, giga: float) -> None:
    assert edge_ibtm.count_macs(edge_ibtm.build_model(name), side) / 1e9 == pytest.approx(giga, rel=0.005)


@pytest.mark.parametrize(
    ("name", "remove", "giga"),
    [
        ("deit_small_patch16_224", 8, 3.416), ("deit_small_patch16_224", 13, 2.703), ("deit_small_patch16_224", 16, 2.291),
        ("vit_base_patch16_224", 8, 13.104), ("vit_base_patch16_224", 13, 10.367), ("vit_base_patch16_224", 16, 8.772),
    ],
)  # fmt: skip
def test_tome_costs_what_is_published(name: str, remove: int, giga: float) -> None:
    model, left = edge_ibtm.build_model(name), [196]
    width = model.embed_dim
    for _ in range(12):
        left.append(left[-1] - min(remove, left[-1] // 2))
    ratios = [after / before for before, after in zip(left, left[1:])]
    edge_ibtm.insert_mergers(model, merger="tome", keep_ratio=ratios, density="block")
    assert edge_ibtm.count_macs(model) / 1e9 == pytest.approx(giga, rel=0.005)
    blocks = sum(transformer_block_macs(a + 1, width, mlp_tokens=b + 1) for a, b in zip(left, left[1:]))
    assert (blocks + 196 * 768 * width + width * 1000) / 1e9 == pytest.approx(giga, rel=0.005)


@pytest.mark.parametrize(
    ("name", "side", "share"),
    [
        ("mobilevit_s", 256, 0.85), ("mobilevit_s", 224, 0.85), ("efficientvit_b1", 224, 0.86),
        ("efficientvit_b1", 288, 0.86), ("vit_small_patch16_224", 224, 0.75),
        ("vit_base_patch16_224", 224, 0.75), ("swin_tiny_patch4_window7_224", 224, 0.86),
        ("swin_base_patch4_window7_224", 224, 0.86),
    ],
)  # fmt: skip
def test_merging_at_seven_tenths_saves_what_is_promised(name: str, side: int, share: float) -> None:
    model = edge_ibtm.build_model(name)
    base = edge_ibtm.count_macs(model, side)
    assert edge_ibtm.count_macs(edge_ibtm.insert_mergers(model), side) / base <= share


@pytest.mark.parametrize(
    "name", ["mobilevit_xs", "efficientvit_b1", "vit_small_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_the_account_by_shapes_agrees_with_the_counter(name: str) -> None:
    model = edge_ibtm.build_model(name)
    for density in (None, *family_of(model).densities):
        if density:
            edge_ibtm.insert_mergers(model, density=density)
        by_module = analytic_macs(model)
        assert sum(by_module.values()) == pytest.approx(edge_ibtm.count_macs(model), rel=0.01)
        assert any("site" in path for path in by_module) == (density is not None)


def test_oblong_images_and_training_mode() -> None:
    model, _ = BACKBONES["mobilevit"].twin()
    assert edge_ibtm.count_macs(model.train(), (128, 64)) < edge_ibtm.count_macs(model, 128)
    assert edge_ibtm.count_macs(model, [128, 64]) == edge_ibtm.count_macs(model, (128, 64))  # type: ignore[arg-type]
    assert model.training
    for wrong in (0, 64.5, "64", (64, 0), (64, 64, 64)):
        with pytest.raises(UsageError, match="img_size is .*; give at least 1, a whole number"):
            edge_ibtm.count_macs(model, wrong)  # type: ignore[arg-type]


def test_images_of_a_size_that_the_model_does_not_take() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1)
    edge_ibtm.insert_mergers(model, merger="tome", keep_ratio=0.7)
    for ask in (edge_ibtm.count_macs, analytic_macs, schedule):
        with pytest.raises(UsageError, match=r"does not take images of 64 x 64 px: .*\(48\)"):
            ask(model, 64)


@pytest.mark.parametrize("options", [{"img_size": (32, 64)}, {"in_chans": 1}, {"global_pool": "map", "class_token": False}])
def test_images_that_are_not_square_or_not_of_three_channels_and_attention_pooling(options: dict[str, object]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **{"img_size": 64, "depth": 2, "num_classes": 10, **options}).eval()
    base = edge_ibtm.count_macs(model)
    by_module = analytic_macs(model)
    assert sum(by_module.values()) == pytest.approx(base, rel=0.01)
    edge_ibtm.insert_mergers(model, merger="tome", macs=0.9)
    assert 0.8 * base < edge_ibtm.count_macs(model) <= 0.9 * base
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    assert [step.entering for step in schedule(model)] == [tokens]


@pytest.mark.parametrize("family", BACKBONES)
def test_frozen_layers_stay_frozen(family: str) -> None:
    model, side = BACKBONES[family].twin()
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.BatchNorm2d)):
            module.eval()
    frozen = {name for name, module in model.named_modules() if not module.training}
    edge_ibtm.count_macs(model, side)
    edge_ibtm.insert_mergers(model, merger="tome")
    analytic_macs(model, side)
    schedule(model, side)
    edge_ibtm.remove_mergers(model)
    assert {name for name, module in model.named_modules() if not module.training} == frozen != set()

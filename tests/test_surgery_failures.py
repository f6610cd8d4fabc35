"""What surgery leaves alone: mergers of before when a new surgery fails, statistics of a model that trains, wrappers."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import edge_ibtm
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.errors import UsageError
from edge_ibtm.surgery import sites_of


def tiny(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **({"img_size": 48, "num_classes": 10, "depth": 2} | options)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "density", "wrong"),
    [
        ("vit", "block", {"keep_ratio": 0.3, "density": "block"}),
        ("vit", "once", {"keep_ratio": [0.7, 0.7]}),
        ("vit", "once", {"macs": 0.01, "img_size": 32}),
        ("mobilevit", "once", {"keep_ratio": 0.1}),
        ("mobilevit", "progressive", {"macs": 0.01, "img_size": 32}),
        ("efficientvit", "once", {"keep_ratio": [0.7, 0.7, 0.7]}),
        ("swin", "block", {"keep_ratio": 0.1}),
    ],
)
def test_a_surgery_that_fails_leaves_the_mergers_of_before(family: str, density: str, wrong: dict[str, object]) -> None:
    model, side = BACKBONES[family].twin()
    images = torch.randn(2, 3, side, side)
    edge_ibtm.insert_mergers(model, density=density)
    for parameter in model.parameters():
        parameter.add_(0.01)
    sites, text, expected = sites_of(model), str(model), model(images)
    with pytest.raises(UsageError):
        edge_ibtm.insert_mergers(model, **wrong)  # type: ignore[arg-type]
    assert sites_of(model) == sites and str(model) == text and torch.equal(model(images), expected)
    edge_ibtm.insert_mergers(model, keep_ratio=0.6)
    assert sites_of(model).keys() and edge_ibtm.remove_mergers(model)(images).shape == expected.shape


def test_a_features_only_model_keeps_its_merger_too() -> None:
    model = timm.create_model("mobilevit_xxs", features_only=True).eval()
    edge_ibtm.insert_mergers(model, merger="tome", density="once")
    images, sites = torch.randn(1, 3, 64, 64), sites_of(model)
    expected = model(images)
    with pytest.raises(UsageError, match="0.1"):
        edge_ibtm.insert_mergers(model, merger="tome", keep_ratio=0.1)
    assert sites_of(model) == sites and all(torch.equal(a, b) for a, b in zip(model(images), expected))


def test_a_trace_of_a_model_in_training_mode_changes_nothing() -> None:
    model, side = BACKBONES["mobilevit"].twin()
    edge_ibtm.insert_mergers(model)
    images = torch.randn(2, 3, side, side)
    expected = edge_ibtm.merge_trace(model, images)
    before = copy.deepcopy(model.train().state_dict())
    got = edge_ibtm.merge_trace(model, images)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(a.assignment, b.assignment) for a, b in zip(expected, got, strict=True))


def ibtm_classes(model: nn.Module, **options: object) -> set[tuple[int, ...]]:
    edge_ibtm.insert_mergers(model, **options)  # type: ignore[arg-type]
    return {tuple(site.merger.information.likelihood.shape) for site in sites_of(model).values()}  # type: ignore[union-attr]


class OwnHead(nn.Module):
    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.head, self.backbone = nn.Sequential(nn.Linear(width, 16), nn.Linear(16, classes)), backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


WRAPPED = {
    "itself": lambda: tiny(num_classes=37),
    "DataParallel": lambda: nn.DataParallel(tiny(num_classes=37)),
    "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(tiny(num_classes=37)),
    "a linear behind it": lambda: nn.Sequential(tiny(num_classes=0), nn.Linear(192, 37)),
    "a head of its own": lambda: OwnHead(tiny(num_classes=0), 192, 37),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_model_has_its_classes_and_its_image_size(kind: str) -> None:
    model, bare = WRAPPED[kind](), tiny(num_classes=37)
    assert edge_ibtm.count_macs(model) == pytest.approx(edge_ibtm.count_macs(bare), rel=0.01)
    assert ibtm_classes(model) == {(37, 37)}
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 37)


def test_where_no_classes_show_they_have_to_be_given() -> None:
    for model in (tiny(num_classes=0), timm.create_model("mobilevit_xxs", features_only=True)):
        text = str(model)
        with pytest.raises(UsageError, match="'ibtm' has to know; give classes=N"):
            edge_ibtm.insert_mergers(model)
        assert str(model) == text and sites_of(edge_ibtm.insert_mergers(model, merger="tome"))
        assert ibtm_classes(model, classes=37) == {(37, 37)}
    for wrong in (0, 2.5):
        with pytest.raises(UsageError, match=f"classes is {wrong}"):
            edge_ibtm.insert_mergers(tiny(), classes=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{"layout": "grid", "keep_ratio": 0.6}, {"keep_ratio": 1.0}, {"merger": "identity"}])
def test_traces_of_models_that_are_not_float32(options: dict[str, object], dtype: torch.dtype) -> None:
    for model, side in ((tiny(), 48), BACKBONES["mobilevit"].twin()):
        edge_ibtm.insert_mergers(model.to(dtype), **options)  # type: ignore[arg-type]
        for trace in edge_ibtm.merge_trace(model, torch.randn(2, 3, side, side, dtype=dtype)):
            assert trace.assignment.dtype == dtype and trace.assignment.shape[0] == 2
            assert (trace.assignment.sum(1) == 1).all()

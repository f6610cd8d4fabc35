"""Every backbone x merger x keep ratio meets one contract, on tiny twins. Registering is testing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import nn

import edge_ibtm
from edge_ibtm.backbones import BACKBONES, family_of
from edge_ibtm.errors import UsageError
from edge_ibtm.mergers import MERGERS, check_merger
from edge_ibtm.surgery import sites_of

PRUNERS = {"tofu", "tofu_ltmp", "ltmp", "ats", "drop"}
RATIOS = (1.0, 0.7, 0.5)


@cache
def twin(family: str) -> tuple[nn.Module, int]:
    torch.manual_seed(3)
    return BACKBONES[family].twin()


def cases() -> list[tuple[str, str, str, str]]:
    found = []
    for family in BACKBONES.values():
        for merger, layout, density in itertools.product(MERGERS, family.layouts, family.densities):
            if density == "once" and layout == "sequence" and family.layouts[0] == "grid":
                continue
            try:
                check_merger(merger, layout, family.attention(twin(family.name)[0]))
            except UsageError:
                continue
            found.append((family.name, merger, layout, density))
    return found


def merged(family: str, **options: object) -> tuple[nn.Module, int]:
    model, side = twin(family)
    torch.manual_seed(5)
    return edge_ibtm.insert_mergers(copy.deepcopy(model), **options), side  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize(("family", "merger", "layout", "density"), cases())
def test_contract(family: str, merger: str, layout: str, density: str) -> None:
    base, side = twin(family)
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = base(images)
    for ratio in RATIOS:
        model, _ = merged(family, merger=merger, keep_ratio=ratio, layout=layout, density=density)
        output = model(images)
        assert output.shape == expected.shape and torch.isfinite(output).all()
        if ratio == 1.0 or merger == "identity":
            assert torch.allclose(output, expected, atol=1e-6)
        else:
            assert not torch.allclose(output, expected, atol=1e-6)
        exact, doubled = copy.deepcopy(model).double(), images.double()  # in float32 the batch size may decide a near tie
        whole, scale = exact(doubled), output.abs().max()
        assert torch.allclose(exact(doubled[1:2]), whole[1:2], atol=1e-4 * scale, rtol=0)
        assert torch.allclose(exact(doubled.flip(0)), whole.flip(0), atol=1e-4 * scale, rtol=0)
        _check_traces(model, images, merger)
        options = {"merger": merger, "keep_ratio": ratio, "layout": layout, "density": density}
        again = edge_ibtm.insert_mergers(copy.deepcopy(model), **options)  # type: ignore[arg-type]
        assert list(again.state_dict()) == list(model.state_dict())
        edge_ibtm.remove_mergers(model)
        state = base.state_dict()
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert torch.equal(model(images), expected) and str(model) == str(base)


def _check_traces(model: nn.Module, images: torch.Tensor, merger: str) -> None:
    original: dict[str, int] = {}
    persists = family_of(model).name == "vit" or any(getattr(m, "density", "") == "progressive" for m in model.modules())
    for trace in edge_ibtm.merge_trace(model, images):
        tokens = trace.assignment.shape[2]
        if persists:  # sizes count the tokens that entered the first site of the block, or of the model
            tokens = original.setdefault(trace.path.rpartition(".")[0], tokens)
        columns = trace.assignment.sum(1)
        if merger in PRUNERS:
            assert (columns <= 1).all() and (trace.sizes.sum(1) <= tokens).all()
        else:
            assert torch.equal(columns, torch.ones_like(columns))
            assert torch.allclose(trace.sizes.sum(1), torch.full((len(trace.sizes),), float(tokens)))
        prefix = getattr(getattr(model, "blocks", None), "prefix", 0)
        assert torch.equal(trace.assignment[:, :prefix, :prefix], torch.eye(prefix).expand(len(columns), -1, -1))
        assert (trace.weights > 0).all()


@pytest.mark.parametrize(("family", "merger"), sorted({(f, m) for f, m, *_ in cases()}))
def test_gradients_reach_every_learned_parameter(family: str, merger: str) -> None:
    model, side = merged(family, merger=merger, keep_ratio=0.6)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for site in sites_of(model).values():
            for name, buffer in site.named_buffers():
                if name.endswith(("centroids", "step")):
                    buffer.normal_(std=0.1)
    model(torch.randn(2, 3, side, side)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if ".merger." in name and "prune_threshold" not in name:
            assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("family", BACKBONES)
def test_state_dict_round_trip(family: str) -> None:
    model, side = merged(family, merger="ibtm")
    for parameter in model.parameters():
        parameter.add_(0.01)
    other, _ = merged(family, merger="ibtm")
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, side, side)
    assert torch.equal(model(images), other(images))
    base = set(twin(family)[0].state_dict())
    assert base <= set(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("family", BACKBONES)
def test_export_works_twice(family: str) -> None:
    model, side = merged(family, merger="ibtm")
    images = torch.randn(1, 3, side, side)
    expected = model(images)
    for _ in range(2):
        program = torch.export.export(model, (images,)).module()
        assert torch.allclose(program(images), expected, atol=1e-5)


FAST = {("mobilevit", "ibtm"), ("efficientvit", "tofu"), ("vit", "evit")}


def lowered_cases() -> Iterator[object]:
    """Every (family, merger) pair and every place of every family, taking turns in place and ratio; chains; r = 1."""
    places: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for family, merger, layout, density in cases():
        places.setdefault((family, merger), []).append((layout, density))
    found = [("vit", "tome+drop", 0.6, "sequence", "once"), ("vit", "ibtm+evit", 0.6, "sequence", "stage"),
             ("mobilevit", "tome+drop", 0.6, "grid", "stage")]  # fmt: skip
    for turn, ((family, merger), where) in enumerate(places.items()):
        found.append((family, merger, (0.7, 0.5)[turn % 2], *where[turn % len(where)]))
        if merger == "ibtm":
            found += [(family, merger, 0.7, *place) for place in where] + [(family, merger, 1.0, *where[0])]
    for case in dict.fromkeys(found):
        fast = case[:2] in FAST and (case[1] != "ibtm" or (case[2:4] == (0.7, "grid") and case[4] == "stage"))
        yield pytest.param(*case, marks=() if fast else pytest.mark.slow)


@torch.no_grad()
@pytest.mark.parametrize(("family", "merger", "ratio", "layout", "density"), lowered_cases())
def test_lowered_model_loads_and_equals_eager(
    family: str, merger: str, ratio: float, layout: str, density: str, tmp_path: object
) -> None:
    from edge_ibtm.targets.common import run_pte

    model, side = merged(family, merger=merger, keep_ratio=ratio, layout=layout, density=density)
    images = torch.randn(1, 3, side, side)
    artifact = edge_ibtm.lower(model, (images,), tmp_path / "model.pte")  # type: ignore[operator]
    (output,) = run_pte(artifact.path, (images,))
    expected = model(images)
    assert torch.allclose(output, expected, atol=1e-4 * float(expected.abs().max().clamp_min(1)))


PAPER = [
    "mobilevit_xs", "mobilevit_s", "efficientvit_b1", "vit_small_patch16_224", "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224",
]  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", PAPER)
def test_full_size_models_lower_and_equal_eager(name: str, tmp_path: object) -> None:
    from edge_ibtm.macs import default_size
    from edge_ibtm.targets.common import run_pte
    from edge_ibtm.targets.coreml import CoreMLOptions, lower_coreml

    torch.manual_seed(0)
    model = edge_ibtm.insert_mergers(edge_ibtm.build_model(name))
    images = torch.randn(1, 3, *default_size(model))
    artifact = edge_ibtm.lower(model, (images,), tmp_path / "model.pte")  # type: ignore[operator]
    (output,) = run_pte(artifact.path, (images,))
    expected = model(images)
    assert torch.allclose(output, expected, atol=1e-4 * float(expected.abs().max().clamp_min(1)))
    package = lower_coreml(model, (images,), tmp_path / "model.mlpackage", CoreMLOptions())  # type: ignore[operator]
    assert package.bytes > 1_000_000

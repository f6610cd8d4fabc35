"""Core ML packages: what they say of themselves, that they compute what the model computes, and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coreml_models import MEAN, NAMES, STD, Tiny, digits, normalised, randomised, reference, sqnr
from torch import nn

import edge_ibtm
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.cli_targets import _usual_limits
from edge_ibtm.errors import UsageError
from edge_ibtm.targets.coreml import (
    PRECISIONS,
    CoreMLOptions,
    exported_for_coreml,
    lower_coreml,
    package_facts,
    run_mlpackage,
)
from edge_ibtm.targets.coreml_package import open_package, operations, to_bytes
from edge_ibtm.targets.coreml_pte import PackageInside, extract_mlpackage
from edge_ibtm.verify import Limits

FLOAT32, FLOAT16 = 11, 10  # MIL data types


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return randomised(edge_ibtm.insert_mergers(BACKBONES["vit"].twin()[0], merger="ibtm", keep_ratio=0.7))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return digits(32)


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """A ViT of one block, not merged: lowers in seconds."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return randomised(VisionTransformer(32, 8, embed_dim=64, depth=1, num_heads=2, num_classes=5))


MERGED = ("fp16", "w8a8")


@pytest.fixture(scope="module")
def packages(vit: nn.Module, plain: nn.Module, images: torch.Tensor, tmp_path_factory: Any) -> dict[str, Any]:
    """The merged ViT in two precisions, the plain one in all of them (`plain-...`)."""
    folder = tmp_path_factory.mktemp("packages")
    example, notes = normalised(images[:1]), {"author": "A. Author", "license": "MIT", "description": "digits"}
    notes |= {"version": "3", "keep_ratio": "0.7"}
    made = {}
    for precision in PRECISIONS:
        options = CoreMLOptions(precision, NAMES, MEAN, STD, calibration=normalised(images[:6]), metadata=notes)
        for name, model in [("plain-", plain), ("", vit)][: 2 if precision in MERGED else 1]:
            target = folder / f"{name}{precision}.mlpackage"
            made[name + precision] = lower_coreml(model, example, target, options)
    return made


LEAST_DB = {"fp16": 40, "fp32": 90, "int8w": 25, "w8a8": 15, "pal4": 8, "pal6": 20}


@pytest.mark.parametrize("name", [*MERGED, *(f"plain-{p}" for p in PRECISIONS)])
def test_precisions_compute_what_the_model_computes(name, packages, vit, plain, images) -> None:
    wanted = reference(plain if name.startswith("plain") else vit, images)
    got = run_mlpackage(packages[name].path, images)
    precision = name.removeprefix("plain-")
    assert sqnr(wanted, got) >= LEAST_DB[precision]
    again = run_mlpackage(packages[name].path, normalised(images[:2]))
    assert torch.allclose(again, got[:2], atol=float(wanted.abs().max()) * 0.05)
    if precision in ("fp16", "fp32"):
        assert torch.equal(got.argmax(1), wanted.argmax(1))


def test_package_says_what_it_is(packages) -> None:
    facts = package_facts(packages["fp16"].path)
    assert facts.inputs == {"image": "image RGB 32x32"}
    assert facts.outputs == {"logits": "float32 [1, 5]", "classLabel": "string", "classLabel_probs": "dictionary"}
    assert facts.class_count == 5 and facts.specification == 8
    assert {"author": "A. Author", "license": "MIT", "description": "digits", "version": "3"}.items() <= (
        facts.metadata.items()
    )
    assert facts.metadata["keep_ratio"] == "0.7" and facts.metadata["precision"] == "fp16"
    assert facts.operations["matmul"] > 0 and "const" not in facts.operations
    artifact = packages["fp16"]
    assert artifact.bytes == facts.bytes > facts.weight_bytes > 0
    assert (artifact.subgraphs, artifact.delegated, artifact.non_delegated) == (1, sum(facts.operations.values()), 0)
    assert not [f for f in artifact.path.parent.iterdir() if f.name.startswith(".")]


def test_verify_asks_of_a_package_what_its_precision_can_reach(packages, tmp_path) -> None:
    assert _usual_limits(packages["fp16"].path) == Limits(None, sqnr_median_db=40, top1_agreement=0.98)
    assert _usual_limits(packages["plain-int8w"].path) == Limits(None, sqnr_median_db=28, top1_agreement=0.98)
    assert _usual_limits(packages["plain-fp32"].path) == _usual_limits(packages["plain-pal4"].path) == Limits()
    assert _usual_limits(tmp_path / "m.pt2") == Limits()


def test_compressed_weights_are_smaller(packages) -> None:
    weights = {p: package_facts(packages[f"plain-{p}"].path).weight_bytes for p in PRECISIONS}
    assert weights["fp32"] > 1.6 * weights["fp16"] and weights["fp16"] > 1.2 * weights["int8w"]
    assert weights["pal4"] < weights["pal6"] < weights["fp16"]
    counted = package_facts(packages["w8a8"].path).operations
    assert counted["quantize"] > 5 and counted["dequantize"] >= counted["quantize"]
    assert counted["constexpr_affine_dequantize"] > 5


def produced(path: Path, kind: str) -> list[int]:
    """MIL data types of the results of one kind of operation."""
    spec = open_package(path).get_spec()
    return [op.outputs[0].type.tensorType.dataType for op in operations(spec) if op.type == kind]


def test_decisions_stay_in_single_precision(packages) -> None:
    single = produced(packages["fp16"].path, "matmul").count(FLOAT32)
    assert single >= 1 and FLOAT16 in produced(packages["fp16"].path, "matmul")
    assert set(produced(packages["fp16"].path, "rsqrt")) == {FLOAT32}
    assert set(produced(packages["fp16"].path, "gelu")) == {FLOAT16}
    assert set(produced(packages["plain-fp32"].path, "matmul")) == {FLOAT32}


@pytest.mark.slow
def test_merged_pte_in_half_precision(vit, images, tmp_path) -> None:
    artifact = edge_ibtm.lower(vit, normalised(images[:1]), tmp_path / "m.pte", target="coreml_pte")
    assert artifact.subgraphs == 1
    assert sqnr(reference(vit, images), PackageInside(artifact.path)(normalised(images))) >= 40


class FakeCoreML:
    """Stands for Core ML on a Mac: takes what MLModel.predict takes, runs the evaluator."""

    def __init__(self, path: str, **_options: Any) -> None:
        self.path = path

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        ((name, image),) = inputs.items()
        assert name == "image" and image.mode == "RGB" and image.size == (32, 32)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return {"logits": run_mlpackage(self.path, pixels).numpy(), "classLabel": "zero"}


def test_mac_path_feeds_images_of_bytes(packages, images) -> None:
    from edge_ibtm.targets import coreml_mac

    path = packages["plain-fp32"].path
    spec = open_package(path).get_spec()
    wanted = run_mlpackage(path, images[:2])
    outputs = [FakeCoreML(str(path)).predict(coreml_mac.feed(spec, image.float())) for image in images[:2]]
    # products of one image and of two need not round alike
    torch.testing.assert_close(torch.cat([coreml_mac.row(o, NAMES) for o in outputs]), wanted, atol=1e-5, rtol=1e-5)
    table = {"classLabel_probs": dict(zip(reversed(NAMES), [0.5, 0.4, 0.3, 0.2, 0.1])), "classLabel": "four"}
    assert coreml_mac.row(table, NAMES).tolist() == [pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])]


def test_model_is_left_as_it_was(plain, images, tmp_path) -> None:
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    plain.train()
    lower_coreml(plain, normalised(images[:1]), tmp_path / "m.mlpackage", CoreMLOptions("fp16", NAMES, MEAN, STD))
    assert plain.training and all(p.requires_grad for p in plain.parameters())
    plain.eval()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_without_normalisation_the_input_is_a_tensor(plain, images, tmp_path) -> None:
    x = normalised(images[:2])
    artifact = lower_coreml(plain, x[:1], tmp_path / "t.mlpackage")
    assert package_facts(artifact.path).inputs == {"input": "float32 [1, 3, 32, 32]"}
    assert sqnr(reference(plain, images[:2]), run_mlpackage(artifact.path, x)) >= 40


def test_pte_carries_the_package(plain, images, tmp_path) -> None:
    x = normalised(images[:4])
    training = nn.Sequential(plain, nn.Dropout(0.9)).train()  # an artifact is for inference whatever the model's mode
    artifact = edge_ibtm.lower(training, x[:1], tmp_path / "m.pte", target="coreml_pte")
    assert training.training
    plain.eval()
    assert artifact.subgraphs == 1 and artifact.non_delegated <= 2
    assert _usual_limits(artifact.path) == Limits(None, sqnr_median_db=40, top1_agreement=0.98)
    verdict = edge_ibtm.verify(plain, artifact, x, limits=Limits(sqnr_db=40), isolated=True)
    assert verdict.require().samples == 4
    with pytest.raises(UsageError, match=r"m\.pte takes images \[1, 3, 32, 32\], got \[1, 3, 16, 16\]"):
        edge_ibtm.verify(plain, artifact, x[:1, :, :16, :16])
    with pytest.raises(UsageError, match="precision fp16 or fp32"):
        edge_ibtm.lower(plain, x[:1], tmp_path / "bad.pte", target="coreml_pte", precision="pal4")
    taken = extract_mlpackage(artifact.path, tmp_path / "out.mlpackage")
    assert package_facts(taken).operations["gelu"] == 1
    other = edge_ibtm.lower(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4), tmp_path / "x.pte", target="xnnpack")
    assert _usual_limits(other.path) == Limits()
    with pytest.raises(UsageError, match="no Core ML delegate"):
        extract_mlpackage(other.path, tmp_path / "no.mlpackage")
    (tmp_path / "noise.pte").write_bytes(b"not a program")
    with pytest.raises(UsageError, match="no ET magic"):
        extract_mlpackage(tmp_path / "noise.pte", tmp_path / "no.mlpackage")
    assert not (tmp_path / "no.mlpackage").exists()


def test_bytes_and_normalised_images_are_inverse(images) -> None:
    assert torch.allclose(to_bytes(normalised(images), MEAN, STD), images.float(), atol=1e-3)


def test_export_drops_views_of_constants() -> None:
    class Constant(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) + torch.tensor([1.0, 2, 3, 4, 5]).detach()

    program = exported_for_coreml(Constant().eval(), torch.zeros(1, 3, 8, 8))
    kinds = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not kinds & {"aten.alias.default", "aten.detach.default", "aten.lift_fresh_copy.default"}
    x = torch.rand(1, 3, 8, 8)
    assert program.module()(x).shape == (1, 5)

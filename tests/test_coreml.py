"""Core ML packages: what they say of themselves, that they compute what the model computes, and faults."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edge_ibtm
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.targets.coreml import (
    PRECISIONS,
    CoreMLOptions,
    exported_for_coreml,
    lower_coreml,
    package_facts,
    run_mlpackage,
)
from edge_ibtm.targets.coreml_package import open_package, operations, to_bytes
from edge_ibtm.targets.coreml_pte import extract_mlpackage, lower_coreml_pte, run_coreml_pte

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NAMES = ["zero", "one", "two", "three", "four"]
FLOAT32, FLOAT16 = 11, 10  # MIL data types


def digits(size: int, count: int = 12) -> torch.Tensor:
    """Real images as bytes [count, 3, size, size], the channels different from each other."""
    from sklearn.datasets import load_digits

    grey = torch.tensor(load_digits().images[:count]).float()[:, None] / 16
    image = nn.functional.interpolate(grey, size=size, mode="bilinear").clamp(0, 1)
    return (torch.cat([image, 1 - image, image.flip(-1)], 1) * 255).round().to(torch.uint8)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


def sqnr(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


def reference(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(normalised(images))


def randomised(model: nn.Module) -> nn.Module:
    """Biases and mask weights away from zero, so that every part of a merger matters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "first_logits" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


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


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family", ["efficientvit", pytest.param("swin", marks=SLOW), pytest.param("mobilevit", marks=SLOW)]
)
def test_families_in_half_precision(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, size = BACKBONES[family].twin()
    merged = randomised(edge_ibtm.insert_mergers(model, merger="ibtm", keep_ratio=0.7))
    shown = digits(size, 8)
    artifact = lower_coreml(merged, normalised(shown[:1]), tmp_path / "m.mlpackage", CoreMLOptions(mean=MEAN, std=STD))
    wanted = reference(merged, shown)
    got = run_mlpackage(artifact.path, shown)
    assert sqnr(wanted, got) >= 40
    assert torch.equal(got.argmax(1), wanted.argmax(1))


@pytest.mark.slow
def test_merged_pte_in_half_precision(vit, images, tmp_path) -> None:
    artifact = lower_coreml_pte(vit, normalised(images[:1]), tmp_path / "m.pte")
    assert artifact.subgraphs == 1
    assert sqnr(reference(vit, images), run_coreml_pte(artifact.path, normalised(images))) >= 40


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
    assert torch.equal(torch.cat([coreml_mac.row(o, NAMES) for o in outputs]), wanted)
    table = {"classLabel_probs": dict(zip(reversed(NAMES), [0.5, 0.4, 0.3, 0.2, 0.1])), "classLabel": "four"}
    assert coreml_mac.row(table, NAMES).tolist() == [pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])]


def test_model_is_left_as_it_was(vit, packages) -> None:
    assert not [n for n, m in vit.named_modules() if "BytesIn" in type(m).__name__]
    assert all(p.requires_grad for p in vit.parameters())


def test_without_normalisation_the_input_is_a_tensor(plain, images, tmp_path) -> None:
    x = normalised(images[:2])
    artifact = lower_coreml(plain, x[:1], tmp_path / "t.mlpackage")
    assert package_facts(artifact.path).inputs == {"input": "float32 [1, 3, 32, 32]"}
    assert sqnr(reference(plain, images[:2]), run_mlpackage(artifact.path, x)) >= 40


def test_pte_carries_the_package(plain, images, tmp_path) -> None:
    x = normalised(images[:4])
    artifact = lower_coreml_pte(plain, x[:1], tmp_path / "m.pte")
    assert artifact.subgraphs == 1 and artifact.non_delegated <= 2
    assert sqnr(reference(plain, images[:4]), run_coreml_pte(artifact.path, x)) >= 40
    with pytest.raises(UsageError, match="precision fp16 or fp32"):
        lower_coreml_pte(plain, x[:1], tmp_path / "bad.pte", precision="pal4")
    taken = extract_mlpackage(artifact.path, tmp_path / "out.mlpackage")
    assert package_facts(taken).operations["gelu"] == 1
    other = edge_ibtm.lower(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4), tmp_path / "x.pte", target="xnnpack")
    with pytest.raises(UsageError, match="no Core ML delegate"):
        extract_mlpackage(other.path, tmp_path / "no.mlpackage")
    (tmp_path / "noise.pte").write_bytes(b"not a program")
    with pytest.raises(UsageError, match="cannot be read"):
        extract_mlpackage(tmp_path / "noise.pte", tmp_path / "no.mlpackage")
    assert not (tmp_path / "no.mlpackage").exists()


class Tiny(nn.Module):
    """A classifier that lowers in a second."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Unconvertible(Tiny):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * torch.linalg.det(x[0]).sum()


@pytest.mark.parametrize(
    "options,message",
    [
        (CoreMLOptions("fp8"), "unknown Core ML precision 'fp8'"),
        (CoreMLOptions("w8a8", deployment="iOS16"), "w8a8.* needs deployment target iOS17"),
        (CoreMLOptions(deployment="iOS3"), "unknown Core ML deployment target"),
        (CoreMLOptions(class_names=["a", "b"]), "2 class names for 5 logits"),
        (CoreMLOptions(mean=[0.5, 0.5, 0.5]), "mean and std go together"),
        (CoreMLOptions(mean=[0.5], std=[0.5]), "mean needs three numbers"),
        (CoreMLOptions("w8a8"), "needs calibration images"),
    ],
)
def test_bad_options_are_named(options: CoreMLOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        lower_coreml(Tiny().eval(), torch.zeros(1, 3, 8, 8), tmp_path / "m.mlpackage", options)
    assert not list(tmp_path.iterdir())


def test_bad_requests_leave_nothing_behind(tmp_path: Path) -> None:
    model, example = Tiny().eval(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(EdgeIBTMError, match="coremltools could not convert"):
        lower_coreml(Unconvertible().eval(), example, tmp_path / "m.mlpackage")
    with pytest.raises(UsageError, match=r"ends in \.mlpackage"):
        lower_coreml(model, example, tmp_path / "m.pte")
    with pytest.raises(UsageError, match="one image"):
        lower_coreml(model, torch.zeros(2, 3, 8, 8), tmp_path / "m.mlpackage")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.mlpackage").mkdir()
    (tmp_path / "mine.mlpackage" / "thesis.txt").write_text("do not lose")
    with pytest.raises(UsageError, match="not a Core ML package"):
        lower_coreml(model, example, tmp_path / "mine.mlpackage")
    assert (tmp_path / "mine.mlpackage" / "thesis.txt").exists()


def test_packages_are_replaced_whole(tmp_path: Path) -> None:
    example = torch.zeros(1, 3, 8, 8)
    first = lower_coreml(Tiny().eval(), example, tmp_path / "m.mlpackage")
    second = lower_coreml(Tiny(7).eval(), example, tmp_path / "m.mlpackage")
    assert first.sha256 != second.sha256
    assert package_facts(second.path).outputs == {"logits": "float32 [1, 7]"}
    assert [f.name for f in tmp_path.iterdir()] == ["m.mlpackage"]


def test_programs_stay_loaded_until_their_files_change(tmp_path: Path, monkeypatch: Any) -> None:
    from edge_ibtm.targets import mil_eval

    loads: list[str] = []
    real = mil_eval.load_program
    monkeypatch.setattr(mil_eval, "load_program", lambda path: loads.append(str(path)) or real(path))
    image = torch.rand(1, 3, 8, 8)
    for classes, expected in ((5, 1), (7, 2)):
        artifact = lower_coreml(Tiny(classes).eval(), image, tmp_path / "m.mlpackage")
        assert run_mlpackage(artifact.path, image).shape == (1, classes)
        run_mlpackage(artifact.path, image)
        assert len(loads) == expected


def test_broken_packages_are_explained(tmp_path: Path) -> None:
    artifact = lower_coreml(Tiny().eval(), torch.zeros(1, 3, 8, 8), tmp_path / "m.mlpackage")
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UsageError, match="no such package"):
        run_mlpackage(tmp_path / "absent.mlpackage", image)
    with pytest.raises(UsageError, match="not a Core ML package"):
        run_mlpackage(tmp_path, image)
    with pytest.raises(UsageError, match=r"takes images \[1, 3, 8, 8\]"):
        run_mlpackage(artifact.path, torch.zeros(1, 3, 9, 9))
    garbled = shutil.copytree(artifact.path, tmp_path / "garbled.mlpackage")
    next(garbled.rglob("*.mlmodel")).write_bytes(b"\xff" * 40)
    with pytest.raises(UsageError, match="cannot be read"):
        run_mlpackage(garbled, image)
    bare = shutil.copytree(artifact.path, tmp_path / "bare.mlpackage")
    next(bare.rglob("weight.bin")).unlink()
    with pytest.raises(UsageError, match=r"weight.* missing"):
        run_mlpackage(bare, image)


def test_neural_networks_are_refused(tmp_path: Path) -> None:
    import coremltools as ct
    from coremltools.models import datatypes, neural_network

    feature = [("x", datatypes.Array(3))]
    builder = neural_network.NeuralNetworkBuilder(feature, [("y", datatypes.Array(3))])
    builder.add_activation("relu", "RELU", "x", "y")
    ct.models.MLModel(builder.spec, skip_model_load=True).save(str(tmp_path / "old.mlpackage"))
    with pytest.raises(UsageError, match="holds a neuralNetwork, not an ML Program"):
        run_mlpackage(tmp_path / "old.mlpackage", torch.zeros(1, 3))


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


def photographs(size: int) -> torch.Tensor:
    """Bytes [24, 3, size, size]: crops of scikit-learn's two photographs, and digits."""
    from sklearn.datasets import load_sample_images

    crops = []
    for photo in load_sample_images().images:
        whole = torch.from_numpy(photo.copy()).permute(2, 0, 1).float()[None]
        for k in range(8):
            crop = whole[..., 20 * k : 20 * k + 260, 45 * k : 45 * k + 260]
            crops.append(nn.functional.interpolate(crop, size=size, mode="bilinear").round().to(torch.uint8))
    return torch.cat([*crops, digits(size, 8)])


@pytest.mark.slow
@pytest.mark.parametrize("precision,least", [("fp16", 40.0), ("int8w", 25.0)])
@pytest.mark.parametrize(
    "name,size",
    [
        ("mobilevit_s", 256),
        ("efficientvit_b1", 224),
        ("vit_small_patch16_224", 224),
        ("swin_tiny_patch4_window7_224", 224),
    ],
)
def test_full_size_parity(name: str, size: int, precision: str, least: float, tmp_path: Path) -> None:
    """Issue 6: merged models against eager on real images (random weights); prints the figures."""
    torch.manual_seed(0)
    model = edge_ibtm.insert_mergers(edge_ibtm.build_model(name, num_classes=10), merger="ibtm", keep_ratio=0.7)
    shown = photographs(size)
    options = CoreMLOptions(precision, mean=MEAN, std=STD)
    artifact = lower_coreml(randomised(model), normalised(shown[:1]), tmp_path / "m.mlpackage", options)
    wanted, got = reference(model, shown), run_mlpackage(artifact.path, shown)
    agreement = float((wanted.argmax(1) == got.argmax(1)).float().mean())
    print(f"{name} {precision}: {sqnr(wanted, got):.1f} dB, top-1 agreement {agreement:.3f} of {len(shown)} images, "
          f"{artifact.bytes / 1e6:.1f} MB, {artifact.delegated} operations")  # fmt: skip
    assert sqnr(wanted, got) >= least
    assert precision != "fp16" or agreement >= 0.99

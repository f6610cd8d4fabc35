"""Core ML packages as files: refused requests, whole or absent, replaced, broken."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from coreml_models import Tiny

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.targets.coreml import CoreMLOptions, lower_coreml, package_facts, run_mlpackage


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


@pytest.mark.parametrize("deployment,specification", [("iOS15", 6), ("iOS16", 7), ("iOS17", 8), ("iOS18", 9)])
def test_deployment_targets_decide_the_specification(deployment: str, specification: int, tmp_path: Path) -> None:
    image = torch.rand(1, 3, 8, 8)
    options = CoreMLOptions("fp32", deployment=deployment)
    artifact = lower_coreml(Tiny().eval(), image, tmp_path / "m.mlpackage", options)
    assert package_facts(artifact.path).specification == specification
    assert run_mlpackage(artifact.path, image).shape == (1, 5)


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

"""An artifact in a run directory finds the model and the held-out images it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edge_ibtm.checkpoint import MergeSpec, ModelSpec, build, save_state
from edge_ibtm.config import Recipe
from edge_ibtm.errors import UsageError
from edge_ibtm.files import sha256_of
from edge_ibtm.provenance import origin_of, reported

SPEC = ModelSpec("mobilevit_xxs", 10, 64, MergeSpec("tome", 0.7))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What `compress` leaves behind, as far as verify reads it: a report, and the models of two fine-tunings that came out
    with the same figures."""
    record = {"spec": SPEC.to_json(), "top1": 50.0}
    recipe = Recipe.model_validate({"model": {"name": "mobilevit_xxs", "img_size": 64}, "verify": {"images": 3}})
    package = tmp_path / "merged.coreml.fp16.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Data/model.mlmodel").write_bytes(b"program")
    artifact = {
        "path": f"elsewhere/{package.name}", "from_stage": "finetune", "precision": "fp16", "sha256": sha256_of(package)
    }  # fmt: skip
    report = {"recipe": recipe.model_dump(mode="json"), "stages": {"finetune": record}, "artifacts": [artifact]}
    report["entries"] = {"finetune": "finetune-bbb"}
    (tmp_path / "report.json").write_text(json.dumps(report))
    for name, held in (("finetune-aaa", record), ("finetune-bbb", record)):
        folder = tmp_path / "stages" / name
        folder.mkdir(parents=True)
        (folder / "entry.json").write_text(json.dumps({"record": held}))
    torch.manual_seed(0)
    save_state(build(SPEC), tmp_path / "stages/finetune-bbb/weights.safetensors")
    return tmp_path


def test_model_and_images_are_found(run: Path) -> None:
    origin = origin_of(run / "merged.coreml.fp16.mlpackage")
    torch.manual_seed(0)
    wanted = build(SPEC).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in origin.reference.state_dict().items())
    assert origin.images.shape == (3, 3, 64, 64) and origin.stage == "finetune" and origin.limits.sqnr_median_db == 40
    assert len(origin_of(run / "merged.coreml.fp16.mlpackage", 5).images) == 5
    assert reported(run / "merged.coreml.fp16.mlpackage")
    assert not reported(run / "of_somebody_else.pte") and not reported(run / "stages/merged.coreml.fp16.mlpackage")


def test_what_cannot_be_found_is_said(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UsageError, match="nothing says which model .* give --model"):
        origin_of(tmp_path_factory.mktemp("other") / "m.mlpackage")
    with pytest.raises(UsageError, match=r"knows no mine\.pte"):
        origin_of(run / "mine.pte")
    program = run / "merged.coreml.fp16.mlpackage/Data/model.mlmodel"
    program.write_bytes(b"another")
    with pytest.raises(UsageError, match="has changed since"):
        origin_of(run / "merged.coreml.fp16.mlpackage")
    program.write_bytes(b"program")
    (run / "stages/finetune-bbb/entry.json").unlink()
    with pytest.raises(UsageError, match="no longer under"):
        origin_of(run / "merged.coreml.fp16.mlpackage")

"""The stages themselves, alone and end to end, on real images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from coreml_models import Tiny
from test_pipeline import SPEC

from edge_ibtm import build_model, insert_mergers, pipeline, stages, stages_artifact
from edge_ibtm.cache import Entry
from edge_ibtm.checkpoint import save_state
from edge_ibtm.config import parse_recipe
from edge_ibtm.errors import UsageError
from edge_ibtm.lowering import Workers, carry_out
from edge_ibtm.targets import lower, mil_eval
from edge_ibtm.targets.common import Artifact
from edge_ibtm.watch import Watch

REAL = {
    "model": {"name": "mobilevit_xxs", "img_size": 64},
    "data": {"train_images": 24, "calibration_images": 4, "test_images": 12},
    "base": {"epochs": 1, "batch_size": 12},
    "merge": {"macs": 0.93},
    "finetune": {"epochs": 1, "batch_size": 12, "distill": 0.5},
    "quantize": {"scheme": "none"},
    "lower": {"targets": ["torch"], "base": False},
    "verify": {"max_drop": 100, "images": 4},
}


class Notes(Watch):
    """Keeps what the user is told, and which stages ran."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.ran: list[str] = []

    def started(self, stage: str, reason: str) -> None:
        self.ran.append(stage)

    def note(self, text: str) -> None:
        self.seen.append(text)


def test_real_stages_end_to_end(tmp_path: Path) -> None:
    notes = Notes()
    report = pipeline.compress(parse_recipe(REAL), tmp_path, watch=notes).require()
    base, merged, tuned, artifact = report.rows
    assert 0.8 < merged.macs / base.macs <= 0.93 and tuned.macs == merged.macs
    (line,) = [text for text in notes.seen if "0.93 of the base" in text]
    assert re.search(r"stages\.2\.1\.sites\.0 keeps \d+ of 16 tokens \(keep ratio 0\.\d+\);", line)
    assert artifact.sqnr_db >= 80 and artifact.images == 12 and artifact.top1 == tuned.top1
    assert "finetune" in notes.ran
    again = Notes()
    assert pipeline.compress(parse_recipe(REAL), tmp_path, watch=again).rows == report.rows
    assert again.ran == []


@pytest.mark.slow
def test_a_core_ml_pte_is_evaluated_and_not_timed(tmp_path: Path) -> None:
    wanted = {**REAL, "merge": {"keep_ratio": 0.7}, "lower": {"targets": ["coreml_pte"], "base": True}}
    report = pipeline.compress(parse_recipe(wanted), tmp_path).require()
    (row,) = report.rows[3:]
    assert row.name == "merged.coreml_pte.fp16.pte" and row.subgraphs == 1 and row.images == 4
    assert row.p50_ms is None and 30 < row.sqnr_db < 100
    assert any("evaluated here on the first 4 held-out images" in note for note in report.notes)


@pytest.mark.slow
def test_quantization_aware_training_is_a_scheme(tmp_path: Path) -> None:
    """With the fine-tune loop, from its result on, the float model the teacher."""
    values = {**REAL, "merge": {"keep_ratio": 0.7}, "quantize": {"scheme": "qat", "lr": 1e-3}}
    context = stages.Context(parse_recipe(values), Watch())
    for name in ("data", "finetune", "quantize"):
        (folder := tmp_path / name).mkdir()
        if name == "finetune":
            torch.manual_seed(0)
            model = insert_mergers(build_model("mobilevit_xxs", num_classes=10, img_size=64), keep_ratio=0.7)
            save_state(model, folder / stages.WEIGHTS)
            merge = {"merger": "ibtm", "keep_ratio": 0.7, "layout": "auto", "density": "auto"}
            record: dict[str, Any] = {"spec": {**SPEC, "merge": merge}}
        else:
            record = getattr(stages, f"make_{name}")(context, folder)
        context.done[name] = Entry(name, "", folder, record, "")
    assert record["scheme"] == "qat" and "sqnr_db" not in record and record["images"] == 12
    graph: Any = stages.load_converted(tmp_path / "quantize" / stages.CONVERTED)
    assert any("quantize_per_tensor" in str(n.target) for n in graph.graph.nodes)
    state, weights = model.state_dict(), list(graph.state_dict().values())
    assert not any(torch.equal(state["stem.conv.weight"], w) for w in weights)


@pytest.mark.slow
def test_smoke_recipe_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_ibtm.cli", "compress", "--recipe", "smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and (tmp_path / "merged.xnnpack.int8.pte").stat().st_size > 1e6
    assert all(r["p50_ms"] > 0 for r in report["rows"][-3:])


def test_what_images_are_trained_on_is_in_the_data_record(tmp_path: Path) -> None:
    """Later stages see the data stage by its record and files."""
    plain, augmented = (
        stages.make_data(stages.Context(parse_recipe({**REAL, "data": {**REAL["data"], **more}}), Watch()), tmp_path)
        for more in ({}, {"augment": {"re_prob": 0.5}})
    )
    assert plain != augmented and {**plain, "augment": augmented["augment"]} == augmented and plain["files"]


def test_w8a8_gets_its_calibration_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def lower(model: Any, example: Any, output: str, *, target: str, **options: Any) -> Any:
        seen.update(options)
        return Artifact(Path(output), target, 1, 1, 1, 0, "0" * 64)

    monkeypatch.setattr("edge_ibtm.targets.lower", lower)
    monkeypatch.setattr(stages_artifact, "run_job", lambda job, workers: carry_out(job))
    chosen = parse_recipe({**REAL, "lower": {"targets": ["coreml"], "coreml_precision": "w8a8"}})
    context = stages.Context(chosen, Watch())
    (product,) = stages_artifact.products(chosen, {"coreml": ".mlpackage"})
    for name in ("data", "finetune"):
        folder = tmp_path / name
        folder.mkdir()
        record = stages.make_data(context, folder) if name == "data" else {"spec": SPEC}
        context.done[name] = Entry(name, "", folder, record, "")
    save_state(build_model("mobilevit_xxs", num_classes=10), tmp_path / "finetune" / stages.WEIGHTS)
    stages_artifact.make_lower(context, product, tmp_path, Workers(set()))
    assert seen["precision"] == "w8a8" and seen["calibration"].shape == (4, 3, 64, 64)


def test_a_package_that_cannot_be_evaluated_is_not_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But a wrong output is."""
    chosen = parse_recipe({**REAL, "lower": {"targets": ["coreml"]}})
    context = stages.Context(chosen, Watch())
    (product,) = stages_artifact.products(chosen, {"coreml": ".mlpackage"})
    context.done["data"] = Entry("data", "", tmp_path, stages.make_data(context, tmp_path), "")
    context.done[f"lower-{product.name}"] = Entry("lower", "", tmp_path, {}, "")
    lower(Tiny(10).eval(), torch.randn(1, 3, 64, 64), tmp_path / product.file, target="coreml")
    with monkeypatch.context() as patch:
        patch.setattr(mil_eval, "KNOWN", mil_eval.KNOWN - {"conv"})
        patch.setattr(context, "model", lambda stage: Tiny(10))
        record = stages_artifact.make_verify(context, product, tmp_path)
    assert not record["verified"] and re.search(r"structure was checked.*cannot be run here.*conv \(1\)", record["why"])
    assert record["package"]["operations"]["conv"] == 1
    monkeypatch.setattr(context, "model", lambda stage: Tiny(9))
    with pytest.raises(UsageError, match="output has shape"):
        stages_artifact.make_verify(context, product, tmp_path)

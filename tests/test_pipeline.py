"""The pipeline's order, cache and resumption, with small stand-ins for the stages."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from edge_ibtm import pipeline, stages, stages_artifact
from edge_ibtm.cache import Cache, Stage, locked
from edge_ibtm.config import Recipe, parse_recipe
from edge_ibtm.errors import DeviceError, EdgeIBTMError, GateError, UsageError
from edge_ibtm.lowering import LowerJob, Workers, parallel_jobs, run_job
from edge_ibtm.probe import adb
from edge_ibtm.watch import Watch

SPEC = {"name": "mobilevit_xxs", "num_classes": 10, "img_size": 64, "merge": None}
FIGURES = {"spec": SPEC, "top1": 90.0, "images": 50, "macs": 10, "params": 5, "bytes": 20, "origin": "test"}
PREFLIGHT = {"suffixes": {"xnnpack": ".pte", "coreml": ".mlpackage"}}
LATENCY = {"p50_ms": 2.0, "device": {"name": "x", "cores": 1, "runtime": "r"}, "threads": 1, "samples_ms": [2.0]}


class FakeStages:
    """Stage functions that count their calls and write a file that depends on the recipe."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.top1 = {"base": 90.0, "merge": 50.0, "finetune": 89.0, "quantize": 88.5}
        self.fail: str | None = None
        monkeypatch.setattr(stages, "preflight", lambda recipe: PREFLIGHT)
        part: dict[str, Callable[[Recipe], Any]] = {
            "data": lambda r: r.data,
            "base": lambda r: r.base,
            "merge": lambda r: r.merge,
            "finetune": lambda r: r.finetune,
            "quantize": lambda r: r.quantize,
        }
        for name, section in part.items():
            monkeypatch.setattr(stages, f"make_{name}", self._maker(name, section))
        monkeypatch.setattr(stages_artifact, "make_lower", self.lower)
        monkeypatch.setattr(stages_artifact, "make_verify", self.verify)
        monkeypatch.setattr(stages_artifact, "make_probe", self.probe)

    def _maker(self, name: str, section: Callable[[Recipe], Any]) -> Callable[..., dict[str, Any]]:
        def make(context: Any, folder: Path) -> dict[str, Any]:
            self.begin(name)
            above = "".join(e.digest for e in context.done.values() if e.stage != "check")
            (folder / "weights.safetensors").write_text(f"{section(context.recipe)} {above}")
            if name == "data":
                images = {"train": 9, "calibration": 4, "test": 50}
                return {"source": "s", "classes": ["a", "b"], "images": images, "img_size": 64, "mean": [0], "std": [1]}
            return {**FIGURES, "top1": self.top1[name]}

        return make

    def begin(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fail:
            raise EdgeIBTMError(f"{name} failed")

    def lower(self, context: Any, product: Any, folder: Path, workers: Any) -> dict[str, Any]:
        self.begin(f"lower-{product.name}")
        (folder / product.file).write_text(f"{product.name} {context.done[product.stage].digest}")
        counts = {"bytes": 7, "subgraphs": 1, "delegated": 3, "non_delegated": 0}
        return {**counts, "sha256": "0" * 64, "lowering_seconds": 1.0, "path": product.file}

    def verify(self, context: Any, product: Any, folder: Path) -> dict[str, Any]:
        self.begin(f"verify-{product.name}")
        top1 = self.top1.get(product.stage, 0.0)
        figures = {"sqnr_db": 90.0, "cosine": 1.0, "max_abs": 0.0, "top1_agreement": 1.0}
        return {"verified": True, "top1": top1, "images": 50, **figures, "reference_top1": None}

    def probe(self, context: Any, found: list[Any], folder: Path) -> dict[str, Any]:
        self.begin("probe")
        ratios = [{"value": 0.5}] * (len(found) - 1)
        return {"names": [p.name for p in found], "run": {"results": [LATENCY] * len(found), "ratios": ratios}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    return FakeStages(monkeypatch)


def recipe(**sections: Any) -> Recipe:
    return parse_recipe({"model": {"name": "mobilevit_xxs"}, "lower": {"targets": ["xnnpack"], "jobs": 1}, **sections})


def test_stages_run_in_order_and_artifacts_are_published(fake: FakeStages, tmp_path: Path) -> None:
    report = pipeline.compress(recipe(), tmp_path / "run").require()
    assert fake.calls[:5] == ["data", "base", "merge", "finetune", "quantize"]
    assert fake.calls[5:] == [
        "lower-base.xnnpack.fp32", "lower-merged.xnnpack.fp32", "lower-merged.xnnpack.int8",
        "verify-base.xnnpack.fp32", "verify-merged.xnnpack.fp32", "verify-merged.xnnpack.int8", "probe",
    ]  # fmt: skip
    names = {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")}
    assert names == {
        "base.xnnpack.fp32.pte", "merged.xnnpack.fp32.pte", "merged.xnnpack.int8.pte", "stages",
        "report.json", "report.md", "report.html",
    }  # fmt: skip
    assert [r.speedup for r in report.rows[-3:]] == [None, 2.0, 2.0]


def test_identical_run_does_nothing(fake: FakeStages, tmp_path: Path) -> None:
    pipeline.compress(recipe(), tmp_path)
    fake.calls.clear()
    pipeline.compress(recipe(), tmp_path)
    assert fake.calls == []


def test_keep_ratio_redoes_only_what_depends_on_it(fake: FakeStages, tmp_path: Path) -> None:
    pipeline.compress(recipe(), tmp_path)
    fake.calls.clear()
    pipeline.compress(recipe(merge={"keep_ratio": 0.5}), tmp_path)
    assert "merge" in fake.calls and "lower-merged.xnnpack.int8" in fake.calls and "probe" in fake.calls
    assert not {"data", "base", "lower-base.xnnpack.fp32", "verify-base.xnnpack.fp32"} & set(fake.calls)
    fake.calls.clear()
    pipeline.compress(recipe(), tmp_path)
    assert fake.calls == [], "the first ratio's entries are still there"


def test_artifacts_of_an_earlier_recipe_go(fake: FakeStages, tmp_path: Path) -> None:
    pipeline.compress(recipe(), tmp_path)
    mine = ["base.backup.old.pte", "merged.notes.txt", "merged.mine.pte"]
    for name in mine:
        (tmp_path / name).write_text("not of any run")
    pipeline.compress(recipe(quantize={"scheme": "none"}, lower={"targets": ["xnnpack"], "base": False}), tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.*.*")) == sorted([*mine, "merged.xnnpack.fp32.pte"])


def test_wrong_outputs_on_a_device_miss_a_gate(fake: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"reference": "this host", "max_abs": 1.0, "identical": False, "ok": False}
    result = {**LATENCY, "model": "merged", "parity": wrong}
    run = {"results": [result] * 3, "ratios": [{"value": 0.5}] * 2}
    monkeypatch.setattr(stages_artifact, "make_probe", lambda c, found, f: {"names": [p.name for p in found], "run": run})
    with pytest.raises(GateError, match="3 gates missed: merged on x: outputs right"):
        pipeline.compress(recipe(), tmp_path).require()


def test_what_the_probe_remarked_is_in_the_report(fake: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {**LATENCY, "model": "merged", "stable": False, "notes": ["other processes kept"]}
    run = {"results": [result] * 3, "ratios": [{"value": 0.5}] * 2}
    monkeypatch.setattr(stages_artifact, "make_probe", lambda c, found, f: {"names": [p.name for p in found], "run": run})
    pipeline.compress(recipe(), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("latency: other processes kept") == 1
    assert text.count("latency of merged: still changing when the warm-up ended") == 1


def test_latency_of_another_phone_is_not_this_ones(fake: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for serial in ("one", "two", "two"):
        monkeypatch.setattr(adb, "choose_device", lambda wanted, s=serial: adb.Adb(s, "adb"))
        pipeline.compress(recipe(probe={"device": "android"}), tmp_path)
    assert fake.calls.count("probe") == 2


def test_a_missing_phone_is_told_before_any_work(
    fake: FakeStages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(wanted: str | None) -> adb.Adb:
        raise DeviceError("no phone: connect one")

    monkeypatch.setattr(adb, "choose_device", gone)
    for _ in ("the first run", "a run whose check is cached"):
        with pytest.raises(DeviceError, match="no phone"):
            pipeline.compress(recipe(probe={"device": "android"}), tmp_path)
    assert fake.calls == []
    only_apple = recipe(probe={"device": "android"}, lower={"targets": ["coreml"]}, quantize={"scheme": "none"})
    pipeline.Run(only_apple, tmp_path, Watch()).check()  # nothing of it will be probed


def test_gates_limits_and_report_are_not_part_of_any_key(fake: FakeStages, tmp_path: Path) -> None:
    pipeline.compress(recipe(), tmp_path)
    fake.calls.clear()
    report = pipeline.compress(recipe(verify={"max_drop": 0.2}), tmp_path)
    assert fake.calls == [] and not report.ok


def test_failure_in_lowering_resumes_there(fake: FakeStages, tmp_path: Path) -> None:
    fake.fail = "lower-merged.xnnpack.int8"
    with pytest.raises(EdgeIBTMError, match="int8 failed"):
        pipeline.compress(recipe(), tmp_path)
    assert not list(tmp_path.glob("*.pte")), "nothing is published before everything is done"
    fake.calls.clear()
    fake.fail = None
    pipeline.compress(recipe(), tmp_path)
    assert fake.calls[0] == "lower-merged.xnnpack.int8"
    assert "lower-merged.xnnpack.fp32" not in fake.calls


def test_missed_gate_is_named(fake: FakeStages, tmp_path: Path) -> None:
    fake.top1["quantize"] = 80.0
    report = pipeline.compress(recipe(), tmp_path)
    with pytest.raises(GateError, match=r"int8 graph against fine-tuned: 9.00 points \(at most 2\)"):
        report.require()
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is False


def test_damaged_artifact_is_made_again(fake: FakeStages, tmp_path: Path) -> None:
    pipeline.compress(recipe(), tmp_path)
    fake.calls.clear()
    victim = next((tmp_path / "stages").glob("lower-merged.xnnpack.fp32-*")) / "merged.xnnpack.fp32.pte"
    victim.write_text("rot")
    pipeline.compress(recipe(), tmp_path)
    assert fake.calls == ["lower-merged.xnnpack.fp32"]


def test_without_int8_nothing_is_quantized(fake: FakeStages, tmp_path: Path) -> None:
    pipeline.compress(recipe(quantize={"scheme": "none"}), tmp_path)
    assert "quantize" not in fake.calls and not any("int8" in c for c in fake.calls)


def test_a_stage_resumes_in_its_partial_folder(tmp_path: Path) -> None:
    cache, stage = Cache(tmp_path), Stage("train", {"a": 1})

    def interrupted(folder: Path) -> dict[str, Any]:
        (folder / "scratch").mkdir()
        (folder / "scratch" / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.make(stage, interrupted)
    assert cache.find(stage) is None and "resuming" in cache.why_not(stage)

    def rest(folder: Path) -> dict[str, Any]:
        return {"found": (folder / "scratch" / "checkpoint").read_text()}

    entry = cache.make(stage, rest)
    assert entry.record == {"found": "half"} and not (entry.path / "scratch").exists()


def test_key_covers_source_and_inputs(tmp_path: Path) -> None:
    assert Stage("a", {"x": 1}, ("tokens",)).key != Stage("a", {"x": 2}, ("tokens",)).key
    assert Stage("a", {"x": 1}, ("tokens",)).key != Stage("a", {"x": 1}, ("errors",)).key


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UsageError, match="another run"), locked(tmp_path):
        pass


def test_parallel_jobs_stay_within_reason() -> None:
    assert parallel_jobs(3, 2) == 2 and parallel_jobs(1, 5) == 1
    assert 1 <= parallel_jobs(None, 4) <= max(1, os.cpu_count() or 1)


def test_worker_hands_its_error_over(tmp_path: Path) -> None:
    job = LowerJob(str(tmp_path / "none.safetensors"), str(tmp_path / "x.pte"), "xnnpack", SPEC, {})
    with pytest.raises(UsageError, match="no weights file"):
        run_job(job, Workers(set()))
    assert not (tmp_path / "x.pte").exists()


@pytest.mark.parametrize("module", ["lowering", "probe.child"])
def test_children_watch_their_parent(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = importlib.import_module(f"edge_ibtm.{module}")
    watched: list[bool] = []
    monkeypatch.setattr(child, "end_with_parent", lambda: watched.append(True))
    with contextlib.suppress(OSError):
        child.main(str(tmp_path / "no request"))
    assert watched


def test_worker_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, os\n"
        "child = 'import time; from edge_ibtm.orphans import end_with_parent; end_with_parent(); time.sleep(60)'\n"
        "p = subprocess.Popen([sys.executable, '-c', child]); print(p.pid, flush=True)\n"
        "import time; time.sleep(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=50)
    pid = int(done.stdout)
    for _ in range(60):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1]:
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the worker outlived its parent")


def test_every_stage_names_modules_that_exist() -> None:
    from edge_ibtm.stages_names import SOURCES

    root = Path(pipeline.__file__).parent
    for modules in SOURCES.values():
        for name in modules:
            assert (root / name).is_dir() or list(root.glob(f"{name}.py")), name


def test_what_merging_imports_is_part_of_its_stages_key() -> None:
    from edge_ibtm.stages_names import SOURCES

    root = Path(pipeline.__file__).parent
    files = [root / f"{n}.py" for n in ("tokens", "plan", "site", "information", "surgery")]
    for file in [*files, *(root / "mergers").glob("*.py"), *(root / "backbones").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("edge_ibtm.")):
                continue
            inside = file.parent != root and node.level == 1
            name = (node.module or "").removeprefix("edge_ibtm.").split(".")[0]
            assert inside or name == "errors" or any(fnmatch(name, known) for known in SOURCES["merge"]), (file.name, name)

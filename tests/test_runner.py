"""The C++ runner: the Python runtime's outputs bit for bit, its report, and no crash whatever it is given."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from phone_models import Tiny, tiny, tiny_int8
from typer.testing import CliRunner

from edge_ibtm import runner
from edge_ibtm.cli_phone import register
from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.probe.host import run_files
from edge_ibtm.probe.profile import read_profile

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
pytestmark = needs_cmake
CPU = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


@pytest.fixture(scope="module")
def files() -> Tiny:
    return tiny()


@pytest.fixture(scope="module")
def bundle() -> runner.Bundle:
    return runner.build("host")


def start(bundle: runner.Bundle, *words: object, where: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*bundle.command, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, cwd=where)


def test_outputs_equal_the_python_runtime_bit_for_bit(files: Tiny, bundle: runner.Bundle, tmp_path: Path) -> None:
    paths = [files.pte, files.portable, tiny_int8()]
    files.example.numpy().tofile(tmp_path / "in.bin")
    words: list[object] = ["--inputs", tmp_path / "in.bin", "--cpu_threads", 1, "--num_executions", 5, "--json"]
    for index, path in enumerate(paths):
        words += ["--model_path", path, "--output_file", tmp_path / f"{index}.bin"]
    done = start(bundle, *words)
    assert done.returncode == 0, done.stderr
    python = run_files(paths, [[files.example]] * 3)
    for index, execution in enumerate(python):
        raw = np.fromfile(tmp_path / f"{index}.bin", np.float32)
        assert raw.tobytes() == execution.outputs[0].numpy().tobytes()
    report = json.loads(done.stdout)
    assert [m["model_path"] for m in report["models"]] == [str(path) for path in paths]
    assert report["models"][0]["outputs"] == [{"dtype": "Float", "shape": [1, 10], "nbytes": 40}]


def test_the_report(files: Tiny, bundle: runner.Bundle, tmp_path: Path) -> None:
    words = ["--model_path", files.pte, "--num_executions=11", "--warmup=3", "--cpu_threads", "2", "--cpus", str(CPU)]
    words += ["--etdump_path", tmp_path / "t.etdp", "--etdump_runs", "4", "--progress_file", tmp_path / "p.txt"]
    done = start(bundle, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{files.pte}: p50 ")
    report = json.loads(done.stdout.splitlines()[-1])
    (row,) = report["models"]
    assert len(row["samples_ms"]) == 11 and row["warmup_runs"] >= 3
    assert row["p50_ms"] == pytest.approx(statistics.median(row["samples_ms"]), rel=1e-4)
    assert row["p90_ms"] == pytest.approx(np.percentile(row["samples_ms"], 90), rel=1e-4)
    assert row["load_ms"] > row["init_ms"] > 0 and row["first_ms"] > 0
    assert report["threads"] == 2 and report["cpus"] == [CPU] and report["peak_rss_kb"] > 1000
    assert report["executorch"] == runner.executorch_version()
    rounds = [json.loads(line) for line in (tmp_path / "p.txt").read_text().splitlines()]
    assert [r[0] for r in rounds] == row["samples_ms"]
    profile = read_profile(tmp_path / "t.etdp", 4)
    assert any("Convolution" in o.name and o.calls == 2 for o in profile.operators)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--model_path", "{truncated}"], 3, "is cut short: 2000 of"),
        (["--model_path", "{foreign}"], 3, "not an ExecuTorch program"),
        (["--model_path", "{vulkan}"], 3, "does not load here"),
        (["--model_path", "nowhere.pte"], 3, "No such file"),
        (
            ["--model_path", "{pte}", "--inputs", "{foreign}"],
            4,
            "holds 5000 bytes, the program takes [1,3,32,32] Float",
        ),
        (["--model_path", "{pte}", "--inputs", "{foreign},{foreign}"], 4, "takes 1 inputs, 2 files"),
        (["--model_path", "{pte}", "--output_file", "/proc/x/y"], 6, "cannot write /proc/x/y"),
        (["--model_path", "{pte}", "--num_executions", "0"], 2, "--num_executions 0 is not a number of at least 1"),
        (["--model_path", "{pte}", "--cpus", "999"], 2, "CPU 999"),
        (["--model_path"], 2, "--model_path needs a value"),
        (["--model", "x"], 2, "unknown argument --model"),
        ([], 2, "no --model_path"),
    ],
)
def test_faults_are_a_line_and_an_exit_code(
    files: Tiny, bundle: runner.Bundle, words: list[str], code: int, says: str
) -> None:
    names = {name: getattr(files, name) for name in ("truncated", "foreign", "vulkan", "pte")}
    done = start(bundle, *[word.format(**names) for word in words])
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code and last.startswith("error: ") and says in last
    assert done.stdout == ""


def test_damaged_programs_never_crash_it(files: Tiny, bundle: runner.Bundle, tmp_path: Path) -> None:
    whole = files.pte.read_bytes()
    for seed in range(40):
        rng, data = random.Random(seed), bytearray(whole)
        for position in rng.sample(range(8, len(data)), 1 + 30 * (seed % 3)):
            data[position] = rng.randrange(256)
        damaged = tmp_path / "damaged.pte"
        damaged.write_bytes(data)
        done = start(bundle, "--model_path", damaged, "--num_executions", 1, "--warmup", 0, "--warmup_seconds", 0)
        assert done.returncode in (0, 3, 5, 7), f"seed {seed}: {done.returncode} {done.stderr}"
        assert done.returncode == 0 or "error: " in done.stderr


def test_the_bundle_is_checked_and_reused(bundle: runner.Bundle, tmp_path: Path) -> None:
    assert runner.build("host") == bundle
    copy = tmp_path / "copy"
    shutil.copytree(bundle.folder, copy)
    assert runner.read_bundle(copy) is not None
    (copy / "run.sh").write_text("#!/bin/sh\nexit 0\n")
    assert runner.read_bundle(copy) is None, "a changed file is noticed"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "mine" / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(UsageError, match="holds other files"):
        runner.build("host", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(UsageError, match="unknown architecture 'arm64'"):
        runner.build("arm64")


def test_the_command_shows_checksums(bundle: runner.Bundle) -> None:
    app = typer.Typer()
    register(app)
    done = CliRunner().invoke(app, ["runner", "build"])
    assert done.exit_code == 0
    held = json.loads(done.output.strip().splitlines()[-1])
    assert held["files"] == bundle.files and all(digest in done.output for digest in bundle.files.values())


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_IBTM_CACHE", str(tmp_path))
    monkeypatch.setattr(runner.shutil, "which", lambda tool: None if "aarch64" in tool else f"/usr/bin/{tool}")
    with pytest.raises(EdgeIBTMError, match="apt install g\\+\\+-aarch64-linux-gnu"):
        runner.build("aarch64")


def test_inputs_of_a_wrong_shape_in_python(files: Tiny) -> None:
    with pytest.raises(UsageError, match="1, 3, 32, 32"):
        run_files([files.pte], [[torch.zeros(1, 3, 8, 8)]])

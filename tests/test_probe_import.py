"""Figures of other tools: minibench JSON and executor_runner logs become results that say where they came
from.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edge_ibtm.cli_phone import register
from edge_ibtm.errors import UsageError
from edge_ibtm.probe import Average, Latency
from edge_ibtm.probe.imported import import_results

MODEL = {"name": "mobilevit_s", "backend": "xnnpack", "quantization": "fp32"}
INFO = {"device": "Pixel 8", "os": "Android 14", "arch": "aarch64"}
ROWS = [
    {"benchmarkModel": MODEL, "deviceInfo": INFO, "metric": metric, "actualValue": value}
    for metric, value in (("avg_inference_latency(ms)", 21.5), ("model_load_time(ms)", 40), ("ram_pss_usage(mb)", 77.5))
]
LOG = "I 00:00:00 Model file mobilevit_s.pte is loaded.\n" + "".join(
    f"I executor_runner: Iteration {i} of 6: {20 + i}.5 ms\n" for i in range(1, 7)
)


XCTEST = (
    "/ci/Bench.swift:17: Test Case '-[BenchTests.Latency testForward]' measured [Clock Monotonic Time, s] average: 0.002, "
    "relative standard deviation: 3.1%, values: [0.002100, 0.001900, 0.002000], performanceMetricID:"
    "com.apple.dt.XCTMetric_Clock.time.monotonic, baselineName: \"\"\n"
    "Test Case '-[BenchTests.Latency testForward]' measured [Memory Peak Physical, kB] average: 204800.000, relative standard "
    "deviation: 0.500%, values: [204800.000000], performanceMetricID:x\n"
)


def test_xctest_values_are_seconds(tmp_path: Path) -> None:
    (tmp_path / "xcodebuild.log").write_text(XCTEST)
    (result,) = import_results(tmp_path / "xcodebuild.log").results
    assert result.model == "testForward" and result.device.kind == "apple"
    assert result.samples_ms == pytest.approx((2.1, 1.9, 2.0)) and result.p50_ms == pytest.approx(2.0)


def test_minibench(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(ROWS))
    (result,) = import_results(tmp_path / "m.json").results
    assert isinstance(result, Average) and result.mean_ms == 21.5 and result.load_ms == 40
    assert result.model == "mobilevit_s xnnpack fp32" and result.device.name == "Pixel 8"
    assert "no percentiles" in result.notes[0] and not hasattr(result, "p50_ms")


def test_a_log_of_two_models_gives_two_results(tmp_path: Path) -> None:
    def run(name: str, ms: float) -> str:
        rounds = "".join(f"I executor_runner: Iteration {i} of 3: {ms + i} ms\n" for i in range(1, 4))
        return f"I executor_runner: Model file {name} is loaded.\n{rounds}"

    log = tmp_path / "two.log"
    log.write_text(run("base.pte", 20) + run("merged.pte", 10))
    assert [(r.model, r.p50_ms) for r in import_results(log).results] == [("base", 22), ("merged", 12)]


def test_executor_runner_log(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(LOG)
    (result,) = import_results(tmp_path / "log.txt").results
    assert isinstance(result, Latency) and result.samples_ms == (21.5, 22.5, 23.5, 24.5, 25.5, 26.5)
    assert result.p50_ms == 24.0 and result.model == "mobilevit_s" and "log.txt" in result.source


@pytest.mark.parametrize(
    "text", ["", "hello", "[]", json.dumps([{**ROWS[1]}]), json.dumps([{**ROWS[0], "actualValue": "x"}])]
)
def test_files_without_figures(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(UsageError, match="x"):
        import_results(tmp_path / "x")


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(LOG)
    app = typer.Typer()
    register(app)
    words = ["probe", "--import", str(tmp_path / "log.txt"), "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and json.loads(done.output.strip().splitlines()[-1])["p50_ms"] == 24.0
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["kind"] == "latency"

"""compare: ratio, interval, tolerance, and refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edge_ibtm.cli_phone import register
from edge_ibtm.compare import compare
from edge_ibtm.errors import UsageError
from edge_ibtm.probe.results import summary
from edge_ibtm.probe.schema import Device, Emulated, Latency, ProbeRun

PHONE = Device(kind="android", name="Pixel 8", arch="arm64-v8a", serial="A1")


def _latency(model: str, scale: float, seed: int, **changes: object) -> Latency:
    rng = random.Random(seed)
    samples = [scale * (10 + rng.expovariate(5)) for _ in range(60)]
    fields = {"model": model, "device": PHONE, "threads": 2, **summary(samples), **changes}
    return Latency.model_validate(fields)


def _file(folder: Path, name: str, *results: Latency | Emulated) -> Path:
    path = folder / name
    path.write_text(ProbeRun(results=results).model_dump_json())
    return path


def _cli(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    register(app)
    done = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    return done.exit_code, done.output


def test_ratio_and_interval(tmp_path: Path) -> None:
    a, b = _file(tmp_path, "a.json", _latency("m", 1, 1)), _file(tmp_path, "b.json", _latency("m", 0.8, 2))
    (found,) = compare(a, b)
    assert found.value == pytest.approx(0.8, rel=0.02) and found.low < found.value < found.high < 0.85
    assert not found.regression and found.certain
    assert not compare(a, a)[0].regression


def test_exit_code_follows_the_tolerance(tmp_path: Path) -> None:
    a, b = _file(tmp_path, "a.json", _latency("m", 1, 1)), _file(tmp_path, "b.json", _latency("m", 1.1, 2))
    code, said = _cli(a, b)
    assert code == 1 and "REGRESSION" in said
    assert json.loads(said.strip().splitlines()[-1])["regression"] is True
    code, said = _cli(a, b, "--tolerance", "0.25")
    assert code == 0 and json.loads(said.strip().splitlines()[-1])["regression"] is False


def test_several_models_are_matched_by_name(tmp_path: Path) -> None:
    a = _file(tmp_path, "a.json", _latency("x", 1, 1), _latency("y", 2, 2))
    b = _file(tmp_path, "b.json", _latency("y", 2, 3), _latency("x", 3, 4))
    x, y = compare(a, b)
    assert (x.model, x.regression) == ("x", True) and (y.model, y.regression) == ("y", False)
    with pytest.raises(UsageError, match="no result for y"):
        compare(a, _file(tmp_path, "c.json", _latency("x", 1, 1)))


def test_only_like_is_compared_with_like(tmp_path: Path) -> None:
    a = _file(tmp_path, "a.json", _latency("m", 1, 1))
    other = PHONE.model_copy(update={"serial": "B2"})
    with pytest.raises(UsageError, match="same device"):
        compare(a, _file(tmp_path, "b.json", _latency("m", 1, 1, device=other)))
    with pytest.raises(UsageError, match="threads 2 in the first file, 4"):
        compare(a, _file(tmp_path, "b.json", _latency("m", 1, 1, threads=4)))
    emulated = Emulated(model="m", device=Device(kind="emulated", name="qemu"), instructions=10)
    with pytest.raises(UsageError, match="is emulated"):
        compare(a, _file(tmp_path, "b.json", emulated))


def test_instructions_compare_without_an_interval(tmp_path: Path) -> None:
    device = Device(kind="emulated", name="qemu")
    one, two = (Emulated(model="m", device=device, instructions=n) for n in (1000, 1200))
    (found,) = compare(_file(tmp_path, "a.json", one), _file(tmp_path, "b.json", two))
    assert found.value == 1.2 and found.low is None and found.regression


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-0.1"])
def test_a_tolerance_that_nothing_could_exceed(tmp_path: Path, tolerance: str) -> None:
    a = _file(tmp_path, "a.json", _latency("m", 1, 1))
    with pytest.raises(UsageError, match=f"tolerance = {tolerance}; give a finite share"):
        compare(a, a, tolerance=float(tolerance))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results file"):
        compare(tmp_path / "a", tmp_path / "b")
    (tmp_path / "x").write_text("hello")
    with pytest.raises(UsageError, match="holds no JSON result"):
        compare(tmp_path / "x", tmp_path / "x")

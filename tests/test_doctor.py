"""doctor: each line is right about what is here, and a missing part names its cure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edge_ibtm import doctor
from edge_ibtm.cli_phone import register


def _named(name: str) -> doctor.Check:
    return {check.name: check for check in doctor.examine()}[name]


def test_versions_are_the_installed_ones() -> None:
    import torch

    check = _named("torch")
    assert check.found.partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("found", "state"),
    [("1.5.1", "ok"), ("1.5.1+cpu", "ok"), ("1.4.0", "wrong"), ("1.6.0", "ok"), ("missing", "wrong")],
)
def test_versions_against_the_table(monkeypatch: pytest.MonkeyPatch, found: str, state: str) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: found)
    check = doctor._package("executorch", "1.5.1")
    assert check.state == state
    assert bool(check.advice) == (not found.startswith("1.5.1"))


def test_missing_tools_name_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ADB", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "adbutils", None)
    checks = {check.name: check for check in doctor.examine()}
    assert checks["qemu-aarch64"].state == "missing" and "apt install qemu-user" in checks["qemu-aarch64"].advice
    assert checks["aarch64-linux-gnu-g++"].advice == "apt install g++-aarch64-linux-gnu"
    assert checks["adb"].state == checks["phones"].state == "missing"
    assert all(check.state != "wrong" for check in checks.values() if check.name in doctor._TOOLS)


def test_an_unauthorized_phone_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adb = tmp_path / "adb"
    adb.write_text('#!/bin/sh\nprintf "List of devices attached\\nR58\\tunauthorized\\n"\n')
    adb.chmod(0o755)
    monkeypatch.setenv("ADB", str(adb))
    check = _named("phones")
    assert check.state == "wrong" and "R58 (unauthorized)" in check.found and "unlock" in check.advice


def test_the_command() -> None:
    app = typer.Typer()
    register(app)
    done = CliRunner().invoke(app, ["doctor"])
    last = json.loads(done.output.strip().splitlines()[-1])
    assert done.exit_code == (0 if last["ok"] else 1)
    assert {"torch", "adb", "cmake"} <= {check["name"] for check in last["checks"]}

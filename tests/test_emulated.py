"""Arm under emulation: parity, instruction counts that repeat, and the whole Android probe with the Arm
bundle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_adbd import FakePhone
from phone_models import Tiny, silu_alone, tiny, tiny_int8, tiny_silu_int8
from test_android import ADB, QUICK, adb_server, connect  # noqa: F401

from edge_ibtm import runner
from edge_ibtm.errors import DeviceError, UsageError
from edge_ibtm.probe import emulated
from edge_ibtm.probe.android import AndroidOptions, probe_android
from edge_ibtm.probe.emulated import EmulationOptions, verify_aarch64
from edge_ibtm.probe.host import Execution, run_files
from edge_ibtm.probe.parity import judge

QEMU = shutil.which("qemu-aarch64")
pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed: apt install qemu-user"),
    pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no aarch64 cross compiler"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
]


@pytest.fixture(scope="module")
def files() -> Tiny:
    return tiny()


@pytest.fixture(scope="module")
def arm() -> runner.Bundle:
    try:
        return runner.build("aarch64")
    except runner.EdgeIBTMError as error:
        if "downloading" in str(error):
            pytest.skip(f"the aarch64 wheel cannot be downloaded here: {error}")
        raise


def test_fp32_and_counts(files: Tiny, arm: runner.Bundle) -> None:
    found = verify_aarch64(files.pte, [files.example], [files.expected])
    assert found.emulated and found.device.name == "qemu-aarch64 -cpu cortex-a76"
    assert found.parity.ok and found.parity.max_abs <= 1e-4
    assert 20_000 < found.instructions < 2_000_000
    guest = verify_aarch64(files.portable, [files.example])
    assert guest.instructions > 3 * found.instructions, "without the delegate it takes many more instructions"


def test_int8_is_bit_identical(files: Tiny, arm: runner.Bundle) -> None:
    found = verify_aarch64(tiny_int8(), [files.example], options=EmulationOptions(count=False))
    assert found.parity.identical and found.parity.ok and "identical" in found.parity.limit
    assert found.instructions is None


def test_wrong_eager_outputs_are_seen(files: Tiny, arm: runner.Bundle) -> None:
    found = verify_aarch64(files.pte, [files.example], [files.expected + 0.01], options=EmulationOptions(count=False))
    assert not found.parity.ok


def test_counts_are_left_out_with_a_reason(files: Tiny, arm: runner.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "build_plugin", lambda folder: (None, "no C compiler; apt install gcc"))
    found = verify_aarch64(files.pte, [files.example])
    assert found.instructions is None and "instructions not counted: no C compiler" in found.notes[0]


@pytest.mark.slow
def test_float_kernels_are_what_differs_in_an_8bit_program(files: Tiny, arm: runner.Bundle) -> None:
    """Convolutions in 8 bits are exact on Arm (above); SiLU in float is not, by its last bit."""
    alone = verify_aarch64(silu_alone(), [files.example], options=EmulationOptions(count=False)).parity
    assert not alone.identical and 0 < alone.max_abs < 1e-6
    (here,) = run_files([tiny_silu_int8()], [[files.example]], trace=True)
    assert here.quantized and "Sigmoid" in here.float_kernels and "Convolution" not in here.float_kernels
    (plain,) = run_files([files.pte], [[files.example]], trace=True)
    assert not plain.quantized and "Convolution" in plain.float_kernels


EIGHT_BIT = ("Convert (NC)", "Convolution (NHWC, QC8) IGEMM")
MIXED = (*EIGHT_BIT, "Sigmoid (NC)", "Softmax (NC, F32)")


def test_judging_floats() -> None:
    here = torch.tensor([[1.0, 2.0, 3.0]])
    moved = here + torch.tensor([[0.0, 0.0, 0.01]])
    assert not judge([moved], Execution([], [here], ()), None)[0].ok
    assert judge([here + 1e-5], Execution([], [here], ()), [here])[0].ok
    parity, notes = judge([here + 1e-5], Execution([], [here], ()), [here + 0.01])
    assert not parity.ok and parity.reference == "eager outputs" and "this machine's runtime" in notes[0]
    parity, notes = judge([moved], Execution([], [here], ()), [here])
    assert not parity.ok and parity.reference == "the same file in this machine's runtime" and "against eager" in notes[0]
    with pytest.raises(DeviceError, match="NaN"):
        judge([here * float("nan")], Execution([], [here], ()), None)


def test_judging_8bit() -> None:
    here = torch.tensor([[1.0, 2.0, 3.0]])
    moved = here + torch.tensor([[0.0, 0.0, 0.01]])
    parity, notes = judge([moved], Execution([], [here], MIXED), None)
    assert parity.ok and not parity.identical and "1 of 3 outputs differ from x86" in notes[0]
    assert "it runs Sigmoid, Softmax; where these compute in float" in notes[0]
    parity, notes = judge([moved], Execution([], [here], EIGHT_BIT), None)
    assert not parity.ok and "this is not explained" in notes[0]
    far = here + torch.tensor([[0.5, 0.0, 0.0]])
    assert not judge([far], Execution([], [here], MIXED), None)[0].ok
    eager = here + torch.tensor([[0.25, 0.0, 0.0]])
    parity, notes = judge([far], Execution([], [here], MIXED), [eager])
    assert parity.ok and notes[1].startswith("8-bit against eager: SQNR 23.7 dB there, SQNR 23.7 dB")
    assert not judge([far], Execution([], [here], MIXED), [here])[0].ok, "this machine's outputs are nearer to eager"


def test_requests_that_make_no_sense(files: Tiny) -> None:
    with pytest.raises(UsageError, match="-cpu max"):
        EmulationOptions(cpu="max")
    with pytest.raises(UsageError, match="cut short"):
        verify_aarch64(files.truncated)


@pytest.mark.skipif(ADB is None, reason="adb is not installed: apt install adb")
def test_android_probe_with_an_arm_phone(
    files: Tiny, arm: runner.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone = connect(FakePhone(tmp_path / "phone", abi="arm64-v8a,armeabi-v7a"))
    folder = _for_qemu(arm, tmp_path / "bundle")
    monkeypatch.setenv("EDGE_IBTM_CACHE", str(tmp_path / "cache"))
    options = AndroidOptions(serial=phone.serial, runner=folder, threads=1, loop=replace(QUICK, profile=True))
    run = probe_android([files.pte, tiny_int8()], [[files.example]] * 2, options, [[files.expected]] * 2)
    phone.close()
    float_one, int8 = run.results
    assert float_one.device.arch == "arm64-v8a" and float_one.parity.ok and not float_one.parity.identical
    assert int8.parity.identical and len(int8.samples_ms) == 8
    assert any("QC8" in o.name or "QS8" in o.name for o in int8.profile.operators)
    assert phone.left_behind() == []


def _for_qemu(bundle: runner.Bundle, folder: Path) -> Path:
    """The Arm bundle with a start script that this machine can execute: what makes the loopback phone an Arm
    one.
    """
    shutil.copytree(bundle.folder, folder)
    script = f'#!/bin/sh\nd="${{0%/*}}"\nexec {QEMU} -cpu cortex-a76 "$d/{runner.LOADER}" --library-path "$d" '
    (folder / "run.sh").write_text(script + f'"$d/{runner.PROGRAM}" "$@"\n')
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["run.sh"] = hashlib.sha256((folder / "run.sh").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_arm_bundle_is_arm(arm: runner.Bundle) -> None:
    said = subprocess.run([QEMU, *emulated.guest_program(arm), "--help"], capture_output=True, text=True)
    assert said.returncode == 0 and "--model_path" in said.stdout and arm.arch == "aarch64"
    assert (arm.folder / runner.PROGRAM).read_bytes()[18] == 183, "ELF machine EM_AARCH64"

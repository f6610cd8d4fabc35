"""An artifact on an emulated Arm CPU: does it compute the same, and how many instructions does it take?

The aarch64 bundle runs under `qemu-aarch64 -cpu cortex-a76`. What is learned: parity with this machine's
runtime and with eager, and guest instructions of one inference, a cost proxy that repeats to 1e-4. What is
not learned: time. An emulator's milliseconds are not a phone's, so `Emulated` results have no field for them.
QEMU's default `-cpu max` is refused: QEMU 7.2 gives wrong int8 results on its SME path.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ibtm import runner
from edge_ibtm.errors import DeviceError, UsageError
from edge_ibtm.probe.host import run_files
from edge_ibtm.probe.parity import judge
from edge_ibtm.probe.raw import read_outputs, write_inputs
from edge_ibtm.probe.results import file_facts
from edge_ibtm.probe.runner_json import parse_report
from edge_ibtm.probe.schema import Device, Emulated


@dataclass(frozen=True)
class EmulationOptions:
    """cpu: QEMU's CPU model. count: whether to count instructions. timeout: seconds for each emulated
    process.
    """

    cpu: str = "cortex-a76"
    count: bool = True
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if self.cpu == "max":
            raise UsageError("-cpu max computes int8 wrongly in QEMU 7.2 (SME); use cortex-a76 or cortex-a53")


def verify_aarch64(
    path: str | Path,
    inputs: Sequence[Any] | None = None,
    expected: Sequence[Any] | None = None,
    *,
    options: EmulationOptions | None = None,
) -> Emulated:
    """Run a `.pte` on emulated aarch64 and compare its outputs.

    inputs: the tensors it takes; None makes seeded noise. expected: eager outputs; a float artifact must
    match them within 1e-4 as well. Against the x86 runtime: floats within 1e-4 (of the largest output, when
    that is above 1), 8-bit identical, or the difference is explained in `notes` and stays above 40 dB.
    Errors: UsageError (bad file or inputs), EdgeIBTMError (QEMU or the cross compiler is missing),
    DeviceError (the emulated run failed). Whether the outputs agree is `parity.ok`.
    """
    options = options or EmulationOptions()
    path = Path(path).resolve()
    qemu = find_qemu()
    (here,) = run_files([path], None if inputs is None else [tuple(inputs)], trace=True)
    bundle = runner.build("aarch64")
    with tempfile.TemporaryDirectory(prefix="edge-ibtm-arm-") as work:
        guest = _Guest(qemu, bundle, options, Path(work), path, write_inputs(here.inputs, Path(work)))
        outputs = guest.run(1).outputs
        instructions, note = _count(guest) if options.count else (None, ())
    parity, explained = judge(outputs, here, expected)
    return Emulated(
        model=path.stem,
        **file_facts(path),
        device=_device(qemu, options, bundle),
        instructions=instructions,
        parity=parity,
        notes=(*note, *explained),
    )


def find_qemu() -> str:
    """qemu-aarch64 (it takes plugins), else the static one; EdgeIBTMError when neither is installed."""
    for name in ("qemu-aarch64", "qemu-aarch64-static"):
        if found := shutil.which(name):
            return found
    raise DeviceError("qemu-aarch64 is missing: apt install qemu-user; `edge-ibtm doctor` lists what is needed")


@dataclass(frozen=True)
class _Ran:
    outputs: list[Any]
    instructions: int | None


@dataclass(frozen=True)
class _Guest:
    """One program on the emulated CPU, single-threaded so that instruction counts repeat."""

    qemu: str
    bundle: runner.Bundle
    options: EmulationOptions
    work: Path
    model: Path
    inputs: list[Path]

    def run(self, executions: int, plugin: Path | None = None) -> _Ran:
        """Run it `executions` times in one process, after one first run."""
        out = self.work / "out.bin"
        command = [self.qemu, "-cpu", self.options.cpu, *(["-plugin", str(plugin)] if plugin else [])]
        command += guest_program(self.bundle)
        command += ["--model_path", str(self.model), "--output_file", str(out), "--json", "--cpu_threads", "1"]
        command += ["--warmup", "0", "--warmup_seconds", "0", "--num_executions", str(executions)]
        if self.inputs:
            command += ["--inputs", ",".join(map(str, self.inputs))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.options.timeout)
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.model.name} took over {self.options.timeout:.0f} s under emulation") from None
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.strip()][-3:]
            raise DeviceError(f"the emulated runner ended with {done.returncode}: {' | '.join(said) or 'no message'}")
        report = parse_report(done.stdout)
        counted = re.search(r"^ICOUNT (\d+)$", done.stderr, re.MULTILINE)
        return _Ran(read_outputs(out, report["models"][0]["outputs"]), int(counted[1]) if counted else None)


def guest_program(bundle: runner.Bundle) -> list[str]:
    """How QEMU starts the bundle: the loader itself, because a shell script would be this machine's."""
    folder = bundle.folder
    return [str(folder / runner.LOADER), "--library-path", str(folder), str(folder / runner.PROGRAM)]


def _count(guest: _Guest) -> tuple[int | None, tuple[str, ...]]:
    """Instructions of one warm inference: what one more run adds to the whole process."""
    plugin, why = build_plugin(guest.work)
    if plugin is None:
        return None, (f"instructions not counted: {why}",)
    if "static" in Path(guest.qemu).name:
        return None, ("instructions not counted: qemu-aarch64-static takes no plugins; apt install qemu-user",)
    one, two = guest.run(1, plugin).instructions, guest.run(2, plugin).instructions
    if one is None or two is None:
        return None, ("instructions not counted: this QEMU did not run the plugin",)
    return two - one, ()


def build_plugin(folder: Path) -> tuple[Path | None, str]:
    """Compile apps/runner/icount.c with gcc. Returns (library, "") or (None, why not)."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None, "no C compiler; apt install gcc"
    library = folder / "libicount.so"
    source = runner.source_folder() / "icount.c"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None, f"the QEMU plugin does not compile: {done.stderr.strip().splitlines()[-1]}"
    return library, ""


def _device(qemu: str, options: EmulationOptions, bundle: runner.Bundle) -> Device:
    version = subprocess.run([qemu, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    return Device(
        kind="emulated",
        name=f"{Path(qemu).name} -cpu {options.cpu}",
        os="Linux user emulation",
        arch="aarch64",
        runtime=f"executorch {bundle.executorch}",
        facts={"emulator": version},
    )

"""Latency of `.pte` files on this machine, in a child process: a native abort becomes an error message."""

from __future__ import annotations

import json
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.files import check_pte, save_tensors
from edge_ibtm.probe import facts
from edge_ibtm.probe.loop import ProbeOptions
from edge_ibtm.probe.results import latency_of, ratios, unique_labels
from edge_ibtm.probe.schema import Device, ProbeRun, Profile

TRACE_RUNS = 10
_EIGHT_BIT = re.compile(r"\bQ[SUCD]8")  # XNNPACK names kernels by type: QS8, QU8, QC8 and QD8 are 8-bit
_MOVING = re.compile(r"Convert|Copy|Transpose|Static Reshape|Slice|Static Slice|Concat|Constant Pad|Even Split|Unpool")
_KERNEL = re.compile(rb"[A-Z][A-Za-z0-9 ,-]+ \([A-Z0-9, ]+\)[A-Za-z ]*")
_TELLING = re.compile(
    r"not registered|[Mm]issing operator|Expected|expected|unexpected|Attempted|Check failed|terminate"
)


def check_file(path: Path) -> None:
    """UsageError unless `path` is a whole program that a runtime of ExecuTorch may be given."""
    if path.suffix == ".mlpackage":
        raise UsageError(f"{path} runs on Apple devices: `--device mac` or ios; `edge-ibtm verify` evaluates it here")
    check_pte(path)


@dataclass(frozen=True)
class Execution:
    """What one program was given and what it answered, both lists of tensors.

    kernels: names of the kernels that ran, as XNNPACK reports them; None when the run was not traced.
    """

    inputs: list[Any]
    outputs: list[Any]
    kernels: tuple[str, ...] | None = None

    @property
    def quantized(self) -> bool:
        """Whether an 8-bit kernel ran."""
        return any(_EIGHT_BIT.search(name) for name in self.kernels or ())

    @property
    def float_kernels(self) -> tuple[str, ...]:
        """Operators, without their shapes, that compute and are not reported as 8-bit; empty when not traced."""
        computing = [k for k in self.kernels or () if not _EIGHT_BIT.search(k) and not _MOVING.match(k)]
        return tuple(dict.fromkeys(k.partition(" (")[0] for k in computing))


def probe_files(
    paths: Sequence[str | Path],
    inputs: Sequence[Sequence[Any]] | None,
    threads: int | None,
    options: ProbeOptions,
) -> tuple[ProbeRun, list[Execution]]:
    """Probe `.pte` files round-robin in one child process.

    inputs: per file, the tensors it takes; None makes seeded noise of the shapes each program declares.
    Errors: UsageError (missing, foreign or truncated file, inputs that do not fit), EdgeIBTMError (missing
    backend or operator, native abort, timeout).
    """
    files = [Path(path).resolve() for path in paths]
    traced = TRACE_RUNS if options.profile else 0
    answer, executions, profiles = _ask_child(files, inputs, threads, options, traced)
    return _assemble(files, answer, profiles), executions


def run_files(
    paths: Sequence[str | Path], inputs: Sequence[Sequence[Any]] | None = None, trace: bool = False
) -> list[Execution]:
    """Run each `.pte` file once in a child process, untimed, on one thread. Inputs and errors as
    `probe_files`.

    trace: also find out whether 8-bit kernels ran.
    """
    files = [Path(path).resolve() for path in paths]
    return _ask_child(files, inputs, 1, None, int(trace))[1]


def _ask_child(
    files: list[Path],
    inputs: Sequence[Sequence[Any]] | None,
    threads: int | None,
    options: ProbeOptions | None,
    traced: int,
) -> tuple[dict[str, Any], list[Execution], Sequence[Profile | None]]:
    """The child's answer, each file's inputs and outputs, and its profile. options None: run once, untimed."""
    for file in files:
        check_file(file)
    if threads is not None and threads < 1:
        raise UsageError(f"threads = {threads}; give 1 or more")
    import torch

    with tempfile.TemporaryDirectory(prefix="edge-ibtm-probe-") as folder:
        request = _request(Path(folder), files, threads, options, traced)
        given = [[]] * len(files) if inputs is None else [[x.contiguous() for x in one] for one in inputs]
        save_tensors(given, request["inputs"])
        answer = _run_child(Path(folder), request, files)
        saved = torch.load(request["outputs"], weights_only=True)
        kernels = [_kernel_names(path) if traced else None for path in request["etdump"]]
        profiles = _profiles(request["etdump"]) if traced and options else [None] * len(files)
    rows = zip(saved["inputs"], saved["outputs"], kernels, strict=True)
    return answer, [Execution(*row) for row in rows], profiles


def _request(
    folder: Path, files: list[Path], threads: int | None, options: ProbeOptions | None, traced: int
) -> dict[str, Any]:
    return {
        "paths": [str(file) for file in files],
        "threads": threads or facts.usable_cores(),
        "measure": options is not None,
        "options": asdict(options or ProbeOptions()),
        "inputs": str(folder / "inputs.pt"),
        "outputs": str(folder / "outputs.pt"),
        "answer": str(folder / "answer.json"),
        "etdump": [str(folder / f"{i}.etdp") for i in range(len(files))],
        "trace_runs": traced,
    }


def _kernel_names(etdump: str) -> tuple[str, ...]:
    """Names of XNNPACK's kernels in an ETDump, such as `Convolution (NHWC, QC8) IGEMM`, each once."""
    found = _KERNEL.findall(Path(etdump).read_bytes())
    return tuple(sorted({name.decode().strip() for name in found}))


def _run_child(folder: Path, request: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    """Start the child, wait, and turn whatever happened into an answer or an error."""
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "edge_ibtm.probe.child", str(folder / "request.json")]
    names = ", ".join(file.name for file in files)
    timeout = request["options"]["timeout"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, env=_child_environment())
    except subprocess.TimeoutExpired:
        raise EdgeIBTMError(f"probing {names} took over {timeout:.0f} s; take fewer samples") from None
    said = (done.stderr + b"\n" + done.stdout).decode(errors="replace")
    answer_file = Path(request["answer"])
    if not answer_file.exists():
        raise EdgeIBTMError(f"the runtime ended with {_ending(done.returncode)} on {names}: {_last_words(said)}")
    answer: dict[str, Any] = json.loads(answer_file.read_text())
    if "error" in answer:
        kind = UsageError if answer["usage"] else EdgeIBTMError
        hints = list(dict.fromkeys(line for line in said.splitlines() if _TELLING.search(line)))[:4]
        raise kind(answer["error"] + "".join(f"; runtime: {_strip(hint)}" for hint in hints))
    return answer


def _child_environment() -> dict[str, str]:
    """This environment with this package importable, whatever the working directory."""
    import os

    root = str(Path(__file__).resolve().parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_words(text: str) -> str:
    lines = [_strip(line) for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:]) or "it said nothing"


def _strip(line: str) -> str:
    """Without the runtime's `[file.cpp:123]` prefix."""
    return re.sub(r"^\[[\w.]+:\d+\]\s*", "", line.strip())


def _profiles(etdumps: list[str]) -> list[Profile | None]:
    from edge_ibtm.probe.profile import read_profile

    return [read_profile(path, TRACE_RUNS) for path in etdumps]


def _assemble(files: list[Path], answer: dict[str, Any], profiles: Sequence[Profile | None]) -> ProbeRun:
    device = host_device(answer["before"], answer["after"])
    labels = unique_labels([file.stem for file in files])
    results = tuple(
        latency_of(
            file,
            label,
            device,
            row["samples_ms"],
            threads=answer["threads"],
            peak_rss_mb=answer["peak_rss_mb"],
            profile=profile,
            notes=busy_note(answer["before"], answer["after"]),
            **{k: v for k, v in row.items() if k != "samples_ms"},
        )
        for label, file, row, profile in zip(labels, files, answer["results"], profiles, strict=True)
    )
    return ProbeRun(results=results, ratios=ratios(results))


def host_device(before: dict[str, Any], after: dict[str, Any]) -> Device:
    """This machine, with the readings taken around the timed part."""
    return Device(
        kind="host",
        name=facts.cpu_model(),
        os=f"{platform.system()} {platform.release()}",
        arch=platform.machine(),
        cores=facts.usable_cores(),
        runtime=f"executorch {facts.version_of('executorch')}",
        load_average_before=before["load"],
        load_average_after=after["load"],
        cpu_mhz_before=tuple(before["mhz"]),
        cpu_mhz_after=tuple(after["mhz"]),
        thermal_c_before=before["thermal"],
        thermal_c_after=after["thermal"],
        facts={"python": platform.python_version(), "torch": facts.version_of("torch")},
    )


def busy_note(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """A remark when other processes took a tenth of the cores or more while samples were taken."""
    cores, others = facts.usable_cores(), facts.others_cores(before["cpu"], after["cpu"])
    if others is None or others < 0.1 * cores:
        return ()
    return (f"other processes kept {others:.1f} of {cores} cores busy meanwhile: trust only ratios of one run",)

"""A user's own `executor_runner` on the phone: pushed, run once for each model, its log read.

For models that need a backend our bundle does not have (Vulkan, QNN). It makes its own inputs, so nothing is
verified, and it runs one model after the other, so no ratio is given. Tried with a stand-in that prints
executor_runner's lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_ibtm.errors import DeviceError
from edge_ibtm.probe.adb import Adb
from edge_ibtm.probe.android_files import Store
from edge_ibtm.probe.imported import iterations
from edge_ibtm.probe.job import Outcome, run_job, stop
from edge_ibtm.probe.phone import Condition, Phone
from edge_ibtm.probe.results import latency_of, unique_labels
from edge_ibtm.probe.schema import Device, ProbeRun

if TYPE_CHECKING:
    from edge_ibtm.probe.android import AndroidOptions

_NOTES = (
    "taken by the user's executor_runner: inputs of its own, outputs not verified, warm-up runs dropped from its samples",
)


def probe_foreign(
    adb: Adb, phone: Phone, files: Sequence[Path], options: AndroidOptions, cool: Callable[[], Condition]
) -> ProbeRun:
    """Run the program `options.runner` (executor_runner's flags) on each file, once `cool` tells the phone's condition.
    No threads given: its own choice.

    The first `warmup` iterations are dropped. DeviceError when it fails, logs no iterations or the phone stays warm.
    """
    assert options.runner is not None
    program, loop, threads = options.runner, options.loop, options.threads or 0
    flags = ["--num_executions", str(loop.samples + loop.warmup)]
    flags += ["--cpu_threads", str(threads)] if threads else []
    before, outcomes = _run(adb, program, files, flags, options, cool)
    device = Device(
        kind="android", name=phone.name, os=f"Android {phone.android}", arch=phone.abis[0], serial=adb.serial,
        cores=phone.cores or None, runtime=f"user's {program.name}", thermal_c_before=before.zones,
    )  # fmt: skip
    labels = unique_labels([file.stem for file in files])
    return ProbeRun(results=tuple(
        latency_of(
            file, label, device, _samples(outcome, log, program, loop.warmup),
            threads=threads or None, source=program.name, warmup_runs=loop.warmup, notes=_NOTES,
        )
        for label, file, (outcome, log) in zip(labels, files, outcomes, strict=True)
    ))  # fmt: skip


def _run(
    adb: Adb,
    program: Path,
    files: Sequence[Path],
    flags: list[str],
    options: AndroidOptions,
    cool: Callable[[], Condition],
) -> tuple[Condition, list[tuple[Outcome, str]]]:
    """The phone's condition before, and per file the program's outcome and what it said to logcat."""
    store, folder = Store(adb, options.root), f"{options.root}/run-foreign"
    try:
        store.open()
        (runner,) = store.place([program])
        adb.shell(f"chmod 755 {runner}")
        before = cool()
        outcomes = []
        for model in store.place(list(files)):
            adb.shell(f"rm -rf {folder} && mkdir {folder}")
            adb.shell("logcat -c 2>/dev/null", check=False)
            outcome = run_job(adb, folder, [runner, "--model_path", model, *flags], timeout=options.loop.timeout)
            outcomes.append((outcome, adb.shell("logcat -d -s ExecuTorch 2>/dev/null", check=False)))
    finally:
        stop(adb, folder)
        store.clean(False, [folder])
    return before, outcomes


def _samples(outcome: Outcome, logcat: str, program: Path, warmup: int) -> list[float]:
    """Warm iterations from whichever place it logged them to."""
    if outcome.code != 0:
        last = [line for line in (outcome.stdout + outcome.stderr).splitlines() if line.strip()][-2:]
        how = "was killed" if outcome.killed else f"ended with exit code {outcome.code}"
        raise DeviceError(f"{program.name} {how} on the phone: {' | '.join(last) or 'it said nothing'}")
    for text in (outcome.stdout, outcome.stderr, logcat):
        if found := iterations(text)[warmup:]:
            return found
    raise DeviceError(
        f"{program.name} logged no `Iteration i of N: X ms` lines, to its output or to logcat; is it ExecuTorch's "
        "executor_runner with --num_executions?"
    )

"""Latency on an Android phone over adb: one command, no NDK, nothing left behind.

push (by checksum) -> wait until cool -> one process that warms up and runs all models round-robin, pinned ->
pull -> verify against this machine -> clean up. The runner goes on when the cable is pulled; a runner that
Android kills is started again for the rounds that are missing; what was measured is kept in the cache until
the probe is complete. Tried against a test double that speaks the adb protocol, with the Arm bundle under
emulation; not on a real phone yet.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_ibtm import runner
from edge_ibtm.errors import DeviceError, UsageError
from edge_ibtm.files import sha256_of
from edge_ibtm.probe.adb import Adb, ConnectionLost, choose_device
from edge_ibtm.probe.android_files import Store
from edge_ibtm.probe.host import Execution, check_file, run_files
from edge_ibtm.probe.job import Outcome, read_text, run_job, stop
from edge_ibtm.probe.loop import LEAST_SAMPLES, ProbeOptions
from edge_ibtm.probe.phone import Condition, Phone, choose_cores, read_condition, read_phone, wait_until_cool
from edge_ibtm.probe.raw import read_outputs, write_inputs
from edge_ibtm.probe.resume import Rounds
from edge_ibtm.probe.runner_json import Measured, assemble, parse_report
from edge_ibtm.probe.schema import ProbeRun

ROOT = "/data/local/tmp/edge-ibtm"
_EXPLAINED = {
    126: "the phone refused to execute it: wrong ABI, or a folder mounted noexec",
    127: "its program or loader is missing",
}


@dataclass(frozen=True)
class AndroidOptions:
    """How a phone is probed.

    serial: None takes the only phone there is. cores: all, big, little or CPUs such as 4,5. max_temperature:
    Celsius that battery and skin may have when it starts, waited for up to `gate_seconds`. runner: a bundle
    folder, None builds the aarch64 one. keep: leave runner and models on the phone for the next probe.
    reconnect_seconds: how long a pulled cable may stay out. restarts: how often a killed runner is started
    again.
    """

    serial: str | None = None
    threads: int | None = None
    cores: str = "all"
    max_temperature: float = 45.0
    gate_seconds: float = 600.0
    runner: Path | None = None
    root: str = ROOT
    keep: bool = False
    reconnect_seconds: float = 60.0
    restarts: int = 1
    loop: ProbeOptions = field(default_factory=ProbeOptions)


def probe_android(
    paths: Sequence[str | Path],
    inputs: Sequence[Sequence[Any]] | None,
    options: AndroidOptions,
    expected: Sequence[Sequence[Any]] | None = None,
) -> ProbeRun:
    """Probe `.pte` files on a phone, round-robin in one process.

    inputs: per file, the tensors it takes; None makes seeded noise. expected: per file, eager outputs to
    verify against, besides this machine's runtime. Errors: UsageError (files, inputs, options), DeviceError
    (anything about the phone; the message says what to do).
    """
    files = [Path(path).resolve() for path in paths]
    for file in files:
        check_file(file)
    foreign = options.runner is not None and options.runner.is_file()
    if foreign and (options.cores != "all" or options.loop.profile):
        raise UsageError(f"--cores and --profile are for our runner bundle, not for a program such as {options.runner}")
    adb = choose_device(options.serial, reconnect_seconds=options.reconnect_seconds)
    phone = read_phone(adb)
    if foreign:
        from edge_ibtm.probe.android_foreign import probe_foreign

        return probe_foreign(adb, phone, files, options, lambda: cool(adb, options))
    bundle = choose_bundle(options.runner, phone)
    cores = choose_cores(options.cores, phone)
    here = run_files(files, inputs, trace=True)
    session = _Session(adb, phone, bundle, cores, options, files, here)
    measured = session.run()
    return assemble(measured, here, expected)


def choose_bundle(folder: Path | None, phone: Phone) -> runner.Bundle:
    """The runner for this phone. DeviceError when its ABI is not the phone's, or there is none in `folder`."""
    if folder is not None:
        bundle = runner.read_bundle(folder)
        if bundle is None:
            raise DeviceError(
                f"{folder} holds no whole runner bundle; make one with `edge-ibtm runner build --arch aarch64`"
            )
    elif "arm64-v8a" not in phone.abis:
        raise DeviceError(
            f"{phone.name} has the ABI {', '.join(phone.abis)}; the runner needs arm64-v8a. "
            "Give a runner of your own with --runner, or choose a 64-bit Arm phone"
        )
    else:
        return runner.build("aarch64")
    if bundle.arch not in {runner.ABI.get(abi, abi) for abi in phone.abis}:
        raise DeviceError(
            f"the runner in {folder} is for {bundle.arch}, {phone.name} has the ABI {', '.join(phone.abis)}; "
            "build one that fits: `edge-ibtm runner build --arch aarch64`"
        )
    return bundle


def say(text: str) -> None:
    """Progress, on stderr: stdout ends with the JSON line."""
    print(text, file=sys.stderr, flush=True)


def cool(adb: Adb, options: AndroidOptions) -> Condition:
    """The phone's condition once it is cool enough to begin. DeviceError when it stays warm."""
    return wait_until_cool(lambda: read_condition(adb), options.max_temperature, options.gate_seconds, say)


@dataclass
class _Session:
    """One probe of one phone."""

    adb: Adb
    phone: Phone
    bundle: runner.Bundle
    cores: tuple[int, ...]
    options: AndroidOptions
    files: list[Path]
    here: list[Execution]

    def __post_init__(self) -> None:
        loop = {k: v for k, v in asdict(self.options.loop).items() if k in ("warmup", "warmup_seconds")}
        self.hashes = [sha256_of(file) for file in self.files]
        identity = {
            "serial": self.adb.serial, "models": self.hashes, "loop": loop, "cores": self.cores,
            "threads": self.options.threads, "runner": self.bundle.source_sha256,
        }  # fmt: skip
        self.rounds = Rounds(identity, len(self.files))
        self.store = Store(self.adb, self.options.root)
        self.folder = f"{self.options.root}/run-{self.rounds.path.stem}"

    def run(self) -> Measured:
        """Everything that happens on the phone. It is cleaned up whatever happens, if it can be reached."""
        try:
            self.store.open()
            self._salvage()
            start = self.store.place_bundle(self.bundle)
            models = self.store.place(self.files)
            inputs = self._place_inputs()
            before = cool(self.adb, self.options)
            outcome = self._measure(["sh", start, *self._arguments(models, inputs)])
            measured = self._collect(outcome, before)
        finally:
            self._clean()
        self.rounds.forget()
        return measured

    def _salvage(self) -> None:
        """Rounds that an earlier, interrupted probe left on the phone or in the cache."""
        code, _ = self.adb.status(f"[ -d {self.folder} ]")
        if code == 0:
            stop(self.adb, self.folder)
            self.rounds.keep(read_text(self.adb, f"{self.folder}/progress.txt"))
        if self.rounds.taken:
            say(f"going on after {len(self.rounds.taken)} rounds of an earlier probe that was interrupted")

    def _place_inputs(self) -> list[list[str]]:
        with tempfile.TemporaryDirectory() as work:
            local = [write_inputs(one.inputs, Path(work), f"m{i}-") for i, one in enumerate(self.here)]
            return [self.store.place(files) for files in local]

    def _arguments(self, models: list[str], inputs: list[list[str]]) -> list[str]:
        loop, words = self.options.loop, ["--json", "--progress_file", "progress.txt"]
        for index, (model, files) in enumerate(zip(models, inputs, strict=True)):
            words += ["--model_path", model, "--inputs", ",".join(files), "--output_file", f"out{index}.bin"]
            if loop.profile:
                words += ["--etdump_path", f"{index}.etdp"]
        words += ["--warmup", str(loop.warmup), "--warmup_seconds", f"{loop.warmup_seconds:g}"]
        words += ["--seconds", f"{loop.seconds * len(models):g}"]
        words += ["--cpu_threads", str(self.options.threads or len(self.cores))]
        return words + (["--cpus", ",".join(map(str, self.cores))] if self.cores else [])

    def _measure(self, command: list[str]) -> Outcome:
        """Run until all rounds are there. A killed runner is started again for what is missing."""
        for attempt in range(self.options.restarts + 1):
            self.adb.shell(f"rm -rf {self.folder} && mkdir {self.folder}")
            missing = max(LEAST_SAMPLES, self.options.loop.samples - len(self.rounds.taken))
            try:
                outcome = run_job(
                    self.adb,
                    self.folder,
                    [*command, "--num_executions", str(missing)],
                    timeout=self.options.loop.timeout,
                )
            except ConnectionLost as lost:
                raise ConnectionLost(f"{lost}; rounds on the phone are not lost: run the same command again") from None
            held = self.rounds.keep(outcome.progress)
            if not outcome.killed:
                return outcome
            say(f"the runner was killed on the phone after {held} rounds (attempt {attempt + 1})")
        how = "without a trace" if outcome.code is None else f"by signal {outcome.code - 128}"
        raise DeviceError(
            f"the runner was killed on the phone {how}, {attempt + 1} times: most likely it ran out of memory; close "
            f"other apps. {held} rounds are kept in {self.rounds.path}; the same command goes on from there"
        )

    def _collect(self, outcome: Outcome, before: Condition) -> Measured:
        if outcome.code != 0:
            lines = [line for line in outcome.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("error:") or "not registered" in line] or lines[-2:]
            said = " | ".join(errors) or "it said nothing"
            why = f"{_EXPLAINED[outcome.code]} ({said})" if outcome.code in _EXPLAINED else said
            raise DeviceError(f"the runner ended with exit code {outcome.code} on {self.phone.name}: {why}")
        report = parse_report(outcome.stdout)
        with tempfile.TemporaryDirectory() as work:
            outputs = [self._outputs(Path(work), i, row["outputs"]) for i, row in enumerate(report["models"])]
            profiles = [self._profile(Path(work), i) for i in range(len(self.files))]
        return Measured(
            files=self.files,
            report=report,
            samples=[self.rounds.of_model(i) for i in range(len(self.files))],
            outputs=outputs,
            profiles=profiles,
            phone=self.phone,
            serial=self.adb.serial,
            before=before,
            after=read_condition(self.adb),
            placement=self.options.cores,
        )

    def _outputs(self, work: Path, index: int, described: list[dict[str, Any]]) -> list[Any]:
        self.adb.pull(f"{self.folder}/out{index}.bin", work / f"{index}.bin")
        return read_outputs(work / f"{index}.bin", described)

    def _profile(self, work: Path, index: int) -> Any:
        if not self.options.loop.profile:
            return None
        from edge_ibtm.probe.profile import read_profile

        self.adb.pull(f"{self.folder}/{index}.etdp", work / f"{index}.etdp")
        return read_profile(work / f"{index}.etdp", 10)

    def _clean(self) -> None:
        """Take away what was put there. After a lost connection the run's own folder stays: it holds the
        rounds.
        """
        lost = isinstance(sys.exception(), ConnectionLost)
        if lost:
            say(f"{self.folder} stays on the phone until the next probe: it holds the rounds taken so far")
            return
        stop(self.adb, self.folder)
        try:
            self.store.clean(self.options.keep, [self.folder])
        except DeviceError as error:
            say(f"could not clean up {self.options.root} on the phone: {error}")

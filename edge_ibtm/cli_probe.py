"""What `edge-ibtm probe` does: chooses the prober from the options, and prints what it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from edge_ibtm.cli_targets import merger_for
from edge_ibtm.errors import UsageError, refuse, suggest
from edge_ibtm.probe.loop import ProbeOptions
from edge_ibtm.probe.schema import Average, Emulated, Latency, ProbeRun

TARGETS = ("artifact", "torch", "cuda")
FILES = ("host", "android", "mac", "ios")
# Where an option means something: files on a device, or a model in PyTorch; nothing does beside --import. Options that
# _probe_model refuses with a message of its own are let through there.
_MEANT_FOR = {
    "target": (*FILES, "model"), "device": (*FILES, "model"), "samples": (*FILES, "model"), "warmup": (*FILES, "model"),
    "seconds": (*FILES, "model"),
    "files": (*FILES, "model"), "inputs": (*FILES, "model"), "shape": (*FILES, "model"), "model": ("model",),
    "keep_ratio": ("model",), "merger": ("model",), "compiled": ("model",), "threads": ("host", "android", "model"),
    "profile": ("host", "android", "model"), "expected": ("android",), "cores": ("android",),
    "max_temperature": ("android",), "runner": ("android", "ios"),
}  # fmt: skip
_OPTIONS = {"files": "FILES", "compiled": "--compile"}  # where the name is not the option's


@dataclass(frozen=True)
class Settings:
    """The options of the command, as typed; None where a default depends on what is probed."""

    files: list[Path] = field(default_factory=list)
    target: str = "artifact"
    device: str = "host"
    model: str | None = None
    keep_ratio: float | None = None
    merger: str | None = None
    compiled: bool = False
    inputs: Path | None = None
    shape: str | None = None
    expected: Path | None = None
    threads: int | None = None
    samples: int = 100
    warmup: int = 5
    seconds: float = 60.0
    profile: bool = False
    cores: str | None = None
    max_temperature: float | None = None
    runner: Path | None = None
    import_file: Path | None = None


def run(settings: Settings) -> ProbeRun:
    """Carry out one probe command. Errors: UsageError, EdgeIBTMError, DeviceError as `edge_ibtm.probe.probe`."""
    if settings.import_file:
        _refuse_idle(settings, "import", "--import, which brings in what was measured elsewhere")
        from edge_ibtm.probe.imported import import_results

        return import_results(settings.import_file)
    if settings.target not in TARGETS:
        raise UsageError(f"unknown probe target {settings.target!r}; {suggest(settings.target, list(TARGETS))}")
    options = ProbeOptions(
        warmup=settings.warmup, samples=settings.samples, seconds=settings.seconds, profile=settings.profile
    )
    if settings.target != "artifact" or settings.model:
        _refuse_idle(settings, "model", "a model in PyTorch on this machine")
        return _probe_model(settings, options)
    if not settings.files:
        raise UsageError("no artifact given: `edge-ibtm probe FILE.pte`, or `--target torch --model NAME`")
    kind = settings.device.partition(":")[0]
    if kind in FILES:
        _refuse_idle(settings, kind, f"a file on --device {kind}")
    example = _example(settings)
    if kind == "android":
        return _probe_phone(settings, example, options)
    if kind in ("mac", "ios"):
        from edge_ibtm.probe.apple import probe_apple

        given = None if example is None else [(example,)] * len(settings.files)
        return probe_apple(settings.files, given, settings.device, options, app=settings.runner)
    from edge_ibtm.probe import probe_many

    return probe_many(settings.files, example, threads=settings.threads, device=settings.device, options=options)


def _refuse_idle(settings: Settings, place: str, what: str) -> None:
    """UsageError that names the options given that mean nothing where the probe takes place."""
    usual, idle = Settings(), [name for name, places in _MEANT_FOR.items() if place not in places]
    given = {name: value for name in idle if (value := getattr(settings, name)) != getattr(usual, name)}
    typed = {_OPTIONS.get(name, f"--{name.replace('_', '-')}"): value for name, value in given.items()}
    hint = "; `edge-ibtm verify FILE --model NAME` compares outputs on this host" if settings.expected else ""
    refuse(typed, f"no meaning for {what}; leave it out{hint}")


def _probe_phone(settings: Settings, example: Any, options: ProbeOptions) -> ProbeRun:
    from edge_ibtm.probe.android import AndroidOptions, probe_android

    android = AndroidOptions(
        serial=settings.device.partition(":")[2] or None,
        threads=settings.threads,
        cores="all" if settings.cores is None else settings.cores,
        max_temperature=45.0 if settings.max_temperature is None else settings.max_temperature,
        runner=settings.runner,
        loop=options,
    )
    inputs = None if example is None else [(example,)] * len(settings.files)
    expected = None if settings.expected is None else [_tensors(settings.expected)] * len(settings.files)
    return probe_android(settings.files, inputs, android, expected=expected)


def _probe_model(settings: Settings, options: ProbeOptions) -> ProbeRun:
    """Eager or compiled model by name, merged when a keep ratio is given."""
    if settings.device != "host":
        raise UsageError(f"--model runs on this machine, not on --device {settings.device}; lower it and probe the file")
    if settings.files or not settings.model:
        raise UsageError("--target torch|cuda takes a model by name, not files: `probe --target torch --model NAME`")
    if settings.profile:
        raise UsageError("--profile reads ETDump, which only .pte files write; lower the model and probe the file")
    import torch

    import edge_ibtm
    from edge_ibtm.probe.torch_ import probe_models

    merger = merger_for(settings.merger, settings.keep_ratio)
    model = edge_ibtm.build_model(settings.model)
    if settings.keep_ratio is not None:
        model = edge_ibtm.insert_mergers(model, merger=merger, keep_ratio=settings.keep_ratio)
    example = _example(settings)
    if example is None:
        size = (model.pretrained_cfg or {}).get("input_size", (3, 224, 224))
        example = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    device = "cuda" if settings.target == "cuda" else "cpu"
    return probe_models(
        [model], [(example,)], device=device, threads=settings.threads, compiled=settings.compiled, options=options
    )


def _example(settings: Settings) -> Any:
    """The input tensor from --inputs or --shape; None when neither is given."""
    import torch

    shape = _shape(settings.shape)
    if settings.inputs is not None:
        return read_input(settings.inputs, shape)
    if shape is None:
        return None
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--shape {text!r} is no shape; write it as 1,3,224,224")
    return shape


def read_input(path: Path, shape: tuple[int, ...] | None) -> Any:
    """One tensor from a `.pt` file, or from raw little-endian float32 values with a shape."""
    import numpy as np
    import torch

    if path.suffix in (".pt", ".pth"):
        return _tensors(path)[0]
    if not path.is_file():
        raise UsageError(f"no input file {path}; give a .pt tensor or raw float32 values with --shape")
    values = np.fromfile(path, dtype="<f4")
    if shape is None or values.size != int(np.prod(shape)):
        raise UsageError(f"{path} holds {values.size} float32 values; give --shape with that many, such as 1,3,224,224")
    return torch.from_numpy(values).reshape(shape)


def _tensors(path: Path) -> list[Any]:
    """The tensors of a `.pt` file: one, or a list of them."""
    import torch

    try:
        held = torch.load(path, weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} cannot be read as a .pt file of tensors: {error}") from None
    tensors = list(held) if isinstance(held, list | tuple) else [held]
    if not tensors or not all(isinstance(each, torch.Tensor) for each in tensors):
        raise UsageError(f"{path} must hold a tensor or a list of tensors; write it with torch.save(x, PATH)")
    return tensors


def report(run: ProbeRun) -> str:
    """The results for people, then one line of JSON: the single result, or the whole run when there are
    several.
    """
    lines: list[str] = []
    for result in run.results:
        lines += _lines_of(result)
    for ratio in run.ratios:
        lines.append(
            f"{ratio.model} / {ratio.baseline} = {ratio.value:.3f} "
            f"(95 % interval {ratio.low:.3f} to {ratio.high:.3f}, {ratio.rounds} interleaved rounds)"
        )
    last = run.results[0] if len(run.results) == 1 else run
    return "\n".join([*lines, last.model_dump_json()])


def _lines_of(result: Latency | Average | Emulated) -> list[str]:
    device = result.device
    lines = [f"{result.model} on {device.name} ({device.kind}, {device.arch or 'unknown arch'}, {device.runtime})"]
    if isinstance(result, Emulated):
        lines.append(f"  emulated: {result.instructions} guest instructions an inference; no latency")
    elif isinstance(result, Average):
        lines.append(f"  mean {result.mean_ms:.3f} ms, as {result.source} reported it")
    else:
        lines += _latency_lines(result)
    if result.parity is not None:
        sqnr = "identical" if result.parity.identical else f"max abs difference {result.parity.max_abs:.3g}"
        lines.append(f"  outputs against {result.parity.reference}: {sqnr}: {'ok' if result.parity.ok else 'WRONG'}")
    return [*lines, *(f"  note: {note}" for note in result.notes)]


def _latency_lines(result: Latency) -> list[str]:
    low, high = result.median_interval_ms
    lines = [
        f"  p50 {result.p50_ms:.3f} ms ({result.confidence:.0%} interval {low:.3f} to {high:.3f}), "
        f"p90 {result.p90_ms:.3f}, p99 {result.p99_ms:.3f}, {len(result.samples_ms)} samples"
    ]
    if result.threads is not None:  # a log that was imported does not say how it was taken
        lines[0] += f" after {result.warmup_runs} warm-up runs, {result.threads} threads, cores {result.placement}"
    apart = [
        ("load", result.load_ms, "ms"),
        ("first run", result.first_ms, "ms"),
        ("memory added", result.rss_growth_mb, "MB"),
        ("peak RSS of the process", result.peak_rss_mb, "MB"),
    ]
    known = [f"{name} {value:.1f} {unit}" for name, value, unit in apart if value is not None]
    if known:
        lines.append("  " + ", ".join(known))
    if result.profile is not None:
        from edge_ibtm.probe.profile import profile_table

        lines.append(profile_table(result.profile))
    return lines


def show(run: ProbeRun, json_path: Path | None) -> None:
    """Print the results, then write them to json_path, whole or not at all: a place that refuses costs no figures."""
    from edge_ibtm.files import write_text

    typer.echo(report(run))
    if json_path:
        write_text(json_path, run.model_dump_json(indent=1) + "\n")

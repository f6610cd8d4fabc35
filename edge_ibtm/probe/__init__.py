"""Latency of one artifact or model on one device, in one schema: host, torch, cuda, android, mac, ios.

probe("model.pte", example).p50_ms
probe_many(["base.pte", "merged.pte"], example).ratios     # interleaved in one run: the only fair comparison
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.errors import UsageError, suggest
from edge_ibtm.probe.loop import ProbeOptions

if TYPE_CHECKING:
    from edge_ibtm.probe.schema import Average, Device, Emulated, Latency, ProbeRun, Ratio, read_results

__all__ = [
    "Average",
    "Device",
    "Emulated",
    "Latency",
    "ProbeOptions",
    "ProbeRun",
    "Ratio",
    "probe",
    "probe_many",
    "read_results",
]
_SCHEMA = ("Average", "Device", "Emulated", "Latency", "ProbeRun", "Ratio", "read_results")
DEVICES = ("host", "torch", "cuda", "android", "mac", "ios")


def __getattr__(name: str) -> Any:
    """The schema's names, imported when asked for: `python -m edge_ibtm.probe.schema` must be its first importer."""
    if name not in _SCHEMA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edge_ibtm.probe import schema

    return getattr(schema, name)


def probe(
    artifact_or_model: Any,
    example: Any,
    *,
    threads: int | None = None,
    device: str = "host",
    options: ProbeOptions | None = None,
) -> Latency:
    """Latency of one artifact (path or `Artifact`) or model (nn.Module).

    example: the input tensor, or a tuple of them, batch included; None makes noise of the shape a .pte
    declares. threads: None uses every core this process may use. device: host; torch or cuda for a module;
    android[:SERIAL]; mac, ios[:NAME] for a .mlpackage. Times in ms. Errors: UsageError (bad file, inputs that
    do not fit, unknown device), EdgeIBTMError (the runtime refused or aborted), DeviceError (a phone failed).
    """
    from edge_ibtm.probe.schema import Latency

    result = probe_many([artifact_or_model], example, threads=threads, device=device, options=options).results[0]
    assert isinstance(result, Latency)
    return result


def probe_many(
    artifacts_or_models: Sequence[Any],
    example: Any,
    *,
    threads: int | None = None,
    device: str = "host",
    options: ProbeOptions | None = None,
) -> ProbeRun:
    """Probe several artifacts, or several models, round-robin in one run; ratios are against the first.

    example: inputs that all of them take, or a list with one tensor or tuple for each. Otherwise as `probe`. A lone
    artifact or model is taken as a list of one.
    """
    if not isinstance(artifacts_or_models, (list, tuple)):
        artifacts_or_models = [artifacts_or_models]
    options = options or ProbeOptions()
    if not artifacts_or_models:
        raise UsageError("nothing to probe: give at least one artifact or model")
    inputs = _inputs_for(artifacts_or_models, example)
    kind, _, name = device.partition(":")
    if kind not in DEVICES:
        raise UsageError(f"unknown device {device!r}; {suggest(kind, list(DEVICES))}")
    if all(_is_module(each) for each in artifacts_or_models):
        if inputs is None:
            raise UsageError("a model needs an example input; give a tensor such as torch.randn(1, 3, 224, 224)")
        return _probe_modules(list(artifacts_or_models), inputs, kind, threads, options)
    paths = [_path_of(each) for each in artifacts_or_models]
    if kind == "host":
        from edge_ibtm.probe.host import probe_files

        return probe_files(paths, inputs, threads, options)[0]
    if kind == "android":
        from edge_ibtm.probe.android import AndroidOptions, probe_android

        return probe_android(paths, inputs, AndroidOptions(serial=name or None, threads=threads, loop=options))
    if kind in ("mac", "ios"):
        from edge_ibtm.probe.apple import probe_apple

        return probe_apple(paths, inputs, device, options)
    raise UsageError(f"device {device!r} probes models in PyTorch, not files; give device='host' for {paths[0]}")


def _probe_modules(
    models: list[Any], inputs: list[tuple[Any, ...]], kind: str, threads: int | None, options: ProbeOptions
) -> ProbeRun:
    from edge_ibtm.probe.torch_ import probe_models

    if kind not in ("host", "torch", "cuda"):
        raise UsageError(f"device {kind!r} runs files, not eager models; lower the model first (edge_ibtm.lower)")
    where = "cuda" if kind == "cuda" else "cpu"
    return probe_models(models, inputs, device=where, threads=threads, options=options)


def _is_module(thing: Any) -> bool:
    from torch import nn

    return isinstance(thing, nn.Module)


def _path_of(thing: Any) -> Path:
    """The file behind a path or an `Artifact`."""
    path = getattr(thing, "path", thing)
    if isinstance(path, str | Path):
        return Path(path)
    raise UsageError(f"cannot probe a {type(thing).__name__}; give a path, an Artifact or an nn.Module (all alike)")


def _inputs_for(things: Sequence[Any], example: Any) -> list[tuple[Any, ...]] | None:
    """One tuple of tensors for each artifact; None when there is no example."""
    if isinstance(example, list):
        if len(example) != len(things):
            raise UsageError(f"{len(example)} examples for {len(things)} artifacts; give one for each, or one tensor")
        return [_tuple(each) for each in example]
    return [_tuple(example)] * len(things) if example is not None else None


def _tuple(example: Any) -> tuple[Any, ...]:
    from torch import Tensor

    tensors = tuple(example) if isinstance(example, tuple | list) else (example,)
    for each in tensors:
        if not isinstance(each, Tensor):
            raise UsageError(f"example must be a tensor or a tuple of tensors, not {type(each).__name__}")
    return tensors

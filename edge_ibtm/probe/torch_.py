"""Latency of an eager or compiled model on CPU or CUDA, in this process, in the same schema as a phone's."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edge_ibtm.errors import UsageError
from edge_ibtm.probe import facts
from edge_ibtm.probe.host import busy_note, host_device
from edge_ibtm.probe.loop import ProbeOptions, sample_rounds, timed_ms, warm_up
from edge_ibtm.probe.results import ratios, summary, unique_labels
from edge_ibtm.probe.schema import Device, Latency, ProbeRun


def probe_models(
    models: Sequence[nn.Module],
    inputs: Sequence[Sequence[Tensor]],
    *,
    device: str = "cpu",
    threads: int | None = None,
    compiled: bool = False,
    options: ProbeOptions | None = None,
) -> ProbeRun:
    """Probe eager (or torch.compile'd) models round-robin under inference mode.

    inputs: per model, the tensors it takes. The models are copied, so the caller's stay where they are. CUDA: each
    sample ends with a synchronisation, so it covers the whole run and not only its launch. Errors: UsageError when
    there is no CUDA device.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown torch device {device!r}; known: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device: torch.cuda.is_available() is False; use --target torch for the CPU")
    options = options or ProbeOptions()
    with _threads(threads) as count, torch.inference_mode():
        moved = [tuple(x.to(device) for x in one) for one in inputs]
        runs = [_runner(model, one, device, compiled) for model, one in zip(models, moved, strict=True)]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = [timed_ms(run) for run in runs]
        warm = [warm_up(run, options) for run in runs]
        before = facts.condition()
        samples = sample_rounds(runs, options)
        after = facts.condition()
    where, notes = _device(device, before, after), (*_notes(device, compiled), *busy_note(before, after))
    memory = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else facts.peak_rss_mb()
    results = tuple(
        Latency(
            model=label, device=where, threads=count, first_ms=first[i], peak_rss_mb=memory, warmup_runs=warm[i][0],
            stable=warm[i][1], notes=notes, **summary(samples[i]),
        )
        for i, label in enumerate(unique_labels([_label(model, compiled) for model in models]))
    )
    return ProbeRun(results=results, ratios=ratios(results))


def _runner(model: nn.Module, inputs: tuple[Tensor, ...], device: str, compiled: bool) -> Callable[[], Any]:
    """A callable that does one whole inference, finished when it returns."""
    module: Any = copy.deepcopy(model).eval() if not isinstance(model, torch.fx.GraphModule) else copy.deepcopy(model)
    module = module.to(device)
    if compiled:
        module = torch.compile(module)

    def run() -> None:
        module(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Torch's intra-op threads set to `count` and put back."""
    if count is not None and count < 1:
        raise UsageError(f"threads = {count}; give 1 or more")
    old = torch.get_num_threads()
    torch.set_num_threads(count or facts.usable_cores())
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(old)


def _device(device: str, before: dict[str, Any], after: dict[str, Any]) -> Device:
    runtime = f"torch {torch.__version__}"
    if device == "cpu":
        return host_device(before, after).model_copy(update={"runtime": runtime})
    card = torch.cuda.get_device_properties(0)
    return Device(
        kind="cuda",
        name=card.name,
        os=platform.platform(),
        arch=f"sm_{card.major}{card.minor}",
        cores=card.multi_processor_count,
        runtime=runtime,
        load_average_before=before["load"],
        load_average_after=after["load"],
        facts={"cuda": str(torch.version.cuda), "memory_mb": str(card.total_memory // 10**6)},
    )


def _label(model: nn.Module, compiled: bool) -> str:
    """timm's own name of the model when it carries one."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    return f"{name or type(model).__name__}{'-compiled' if compiled else '-eager'}"


def _notes(device: str, compiled: bool) -> tuple[str, ...]:
    notes = ["peak_rss_mb is peak device memory"] if device == "cuda" else []
    if compiled:
        notes.append("first_ms includes compilation")
    return tuple(notes)

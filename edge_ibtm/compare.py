"""Two results files against each other: the ratio of each model's median latency, with its interval, and a
verdict.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_ibtm.errors import UsageError
from edge_ibtm.probe.schema import Average, Device, Emulated, Latency, ProbeRun, read_results
from edge_ibtm.probe.statistics import ratio_interval

AnyResult = Latency | Average | Emulated
_METRIC = {"latency": "p50_ms", "average": "mean_ms", "emulated": "instructions"}


@dataclass(frozen=True)
class Comparison:
    """value = B's figure / A's figure. low, high: 95 % bootstrap interval, None where there are no samples.

    regression: value is above 1 + tolerance. certain: the whole interval lies on one side of 1 + tolerance.
    """

    model: str
    metric: str
    before: float
    after: float
    value: float
    low: float | None
    high: float | None
    tolerance: float
    regression: bool
    certain: bool | None
    notes: tuple[str, ...] = ()


def compare(before: str | Path, after: str | Path, *, tolerance: float = 0.05) -> list[Comparison]:
    """Compare results files A (before) and B (after), written by `edge-ibtm probe`.

    One result in each: compared whatever they are called. Several: matched by model name. tolerance: by how
    much B may be slower, 0.05 is 5 %. Errors: UsageError (no such file, no results, nothing in common,
    figures of another device, thread count or kind).
    """
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"tolerance = {tolerance}; give a finite share of at least 0, such as 0.05")
    pairs = _pairs(read_results(before), read_results(after), (str(before), str(after)))
    return [_compare_one(a, b, tolerance) for a, b in pairs]


def _pairs(a: ProbeRun, b: ProbeRun, names: tuple[str, str]) -> list[tuple[AnyResult, AnyResult]]:
    for run, name in zip((a, b), names, strict=True):
        if not run.results:
            raise UsageError(f"{name} holds no results; probe an artifact first")
    if len(a.results) == len(b.results) == 1:
        return [(a.results[0], b.results[0])]
    of_b = {each.model: each for each in b.results}
    missing = [each.model for each in a.results if each.model not in of_b]
    if missing:
        raise UsageError(
            f"{names[1]} has no result for {', '.join(missing)} (it has {', '.join(of_b)}); probe all models again"
        )
    return [(each, of_b[each.model]) for each in a.results]


def _compare_one(a: AnyResult, b: AnyResult, tolerance: float) -> Comparison:
    _comparable(a, b)
    metric = _METRIC[a.kind]
    old, new = getattr(a, metric), getattr(b, metric)
    if not old or not new:
        raise UsageError(f"{a.model} has no {metric} in one of the files; probe it again")
    interval: tuple[float | None, float | None] = (None, None)
    if isinstance(a, Latency) and isinstance(b, Latency) and a.samples_ms and b.samples_ms:
        interval = ratio_interval(b.samples_ms, a.samples_ms)
    low, high = interval
    limit, value = 1 + tolerance, new / old
    certain = None if low is None or high is None else not low <= limit <= high
    notes = tuple(dict.fromkeys((*a.notes, *b.notes)))
    return Comparison(
        model=b.model if a.model == b.model else f"{a.model} -> {b.model}",
        metric=metric,
        before=old,
        after=new,
        value=value,
        low=low,
        high=high,
        tolerance=tolerance,
        regression=value > limit,
        certain=certain,
        notes=notes,
    )


def _comparable(a: AnyResult, b: AnyResult) -> None:
    """UsageError unless both figures mean the same on the same device."""
    if a.kind != b.kind:
        raise UsageError(f"{a.model} is {a.kind}, {b.model} is {b.kind}: these figures cannot be compared")
    if _identity(a.device) != _identity(b.device):
        raise UsageError(
            f"{a.model} ran on {' '.join(_identity(a.device))}, {b.model} on {' '.join(_identity(b.device))}; "
            "only results of the same device can be compared: probe both on one"
        )
    for field in ("threads", "placement"):
        old, new = getattr(a, field, None), getattr(b, field, None)
        if old != new and None not in (old, new):
            raise UsageError(f"{a.model}: {field} {old} in the first file, {new} in the second; probe both alike")


def _identity(device: Device) -> tuple[str, ...]:
    return tuple(part for part in (device.kind, device.name, device.arch, device.serial) if part)


def table(comparisons: list[Comparison]) -> str:
    """One line for each model, figures with their units."""
    return "\n".join(_line(each) for each in comparisons)


def _line(c: Comparison) -> str:
    unit = " ms" if c.metric.endswith("_ms") else " instructions"
    figures = f"{c.before:.4g}{unit} -> {c.after:.4g}{unit}" if unit == " ms" else f"{c.before} -> {c.after}{unit}"
    spread = "no interval" if c.low is None else f"95 % interval {c.low:.3f} to {c.high:.3f}"
    verdict = "REGRESSION" if c.regression else "ok"
    doubt = "" if c.certain is not False else ", within noise of the limit: take more samples"
    return f"{c.model}: {figures}, ratio {c.value:.3f} ({spread}), limit {1 + c.tolerance:.3f}: {verdict}{doubt}"


def json_line(comparisons: list[Comparison]) -> str:
    """The comparisons as one line of JSON."""
    regression = any(each.regression for each in comparisons)
    return json.dumps({"regression": regression, "comparisons": [asdict(each) for each in comparisons]})

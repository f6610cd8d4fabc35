"""Figures that other tools took, brought into the results schema: minibench JSON, executor_runner and XCTest logs.

minibench (ExecuTorch's Android and iOS benchmark apps) writes a list of {benchmarkModel: {name, backend,
quantization}, metric, actualValue, deviceInfo}. It reports means, which become `Average`: no percentile is
invented. executor_runner logs "Iteration i of N: X ms" (also through logcat), which become `Latency` with
every sample. `xcodebuild test` logs `measured [Clock Monotonic Time, s] ... values: [...]` for every `measure` block,
which become one `Latency` each.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edge_ibtm.errors import UsageError
from edge_ibtm.probe.results import summary, unique_labels
from edge_ibtm.probe.schema import Average, Device, DeviceKind, Latency, ProbeRun

_ITERATION = re.compile(r"[Ii]teration (\d+)(?:/| of )(\d+):\s*([\d.]+)\s*ms")
_MODEL = re.compile(r"(?:Model file|model_path[= ]|Loading model:?)\s*['\"]?([^\s'\"]+\.pte)")
_MEASURED = re.compile(
    r"(?:'-\[\S+ (?P<test>\w+)\]' )?measured \[(?:Clock Monotonic Time|Time), s(?:econds)?\]"
    r"[^\n]*?values: \[(?P<values>[^\]]*)\]"
)
_LATENCY = ("avg_inference_latency(ms)", "avg_latency(ms)")


def import_results(path: str | Path, model: str | None = None, device: Device | None = None) -> ProbeRun:
    """Read a file of another tool. model: its label where the file has none. device: where it ran, if the
    file is silent.

    Errors: UsageError when the file holds neither kind of figure.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"no file {path} to import; give a minibench JSON, an executor_runner log or an xcodebuild log"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = _minibench_rows(text)
    if rows:
        return ProbeRun(results=tuple(_averages(rows, path)))
    if tests := _xctest(text, path):
        return ProbeRun(results=tuple(tests))
    runs = _runs(text)
    if not runs:
        raise UsageError(
            f"{path} holds no minibench metrics (avg_inference_latency(ms)), no XCTest `measured [...]` lines and no "
            "executor_runner lines (Iteration 1 of 50: 12.3 ms); run executor_runner with --num_executions 50 and save its log"
        )
    labels = unique_labels([model or (Path(named).stem if named else path.stem) for named, _ in runs])
    return ProbeRun(results=tuple(
        Latency(
            model=label,
            device=device or Device(kind="android", name="unknown: the log does not say"),
            source=f"executor_runner log {path.name}",
            notes=("no warm-up, threads or temperatures are known: the first samples may be cold",),
            **summary(samples),
        )
        for label, (_, samples) in zip(labels, runs, strict=True)
    ))  # fmt: skip


def _runs(text: str) -> list[tuple[str | None, list[float]]]:
    """(model file if named, ms of every iteration) of each run in the log: iterations that count on, after one model line."""
    runs: list[tuple[str | None, list[float]]] = []
    named: str | None = None
    last: int | None = None
    for line in text.splitlines():
        if found := _MODEL.search(line):
            named, last = found[1], None
        for found in _ITERATION.finditer(line):
            if last is None or int(found[1]) <= last:
                runs.append((named, []))
            runs[-1][1].append(float(found[3]))
            last = int(found[1])
    return runs


def iterations(text: str) -> list[float]:
    """Milliseconds of every iteration that a log of executor_runner tells, in order."""
    return [ms for _, samples in _runs(text) for ms in samples]


def _xctest(text: str, path: Path) -> list[Latency]:
    """One result for each `measure` block of an xcodebuild log; XCTest reports seconds."""
    device = Device(kind="apple", name="unknown: the log does not say", runtime="XCTest")
    note = "each value is one pass through a `measure` block, warm-up and threads are the test's own"
    return [
        Latency(
            model=found["test"] or path.stem, device=device, source=f"XCTest log {path.name}", notes=(note,),
            **summary([1000 * float(value) for value in found["values"].split(",")]),
        )
        for found in _MEASURED.finditer(text)
        if found["values"].strip()
    ]  # fmt: skip


def _minibench_rows(text: str) -> list[dict[str, Any]]:
    try:
        held = json.loads(text)
    except ValueError:
        return []
    rows = held if isinstance(held, list) else [held]
    return [row for row in rows if isinstance(row, dict) and "metric" in row and "actualValue" in row]


def _averages(rows: list[dict[str, Any]], path: Path) -> list[Average]:
    """One result for each model, backend and device that the rows speak of."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = json.dumps([row.get("benchmarkModel"), row.get("deviceInfo")], sort_keys=True)
        groups.setdefault(key, []).append(row)
    found = [_average(group, path) for group in groups.values()]
    known = [each for each in found if each is not None]
    if not known:
        raise UsageError(f"{path} has minibench rows but none with {' or '.join(_LATENCY)}; nothing to import")
    return known


def _average(group: list[dict[str, Any]], path: Path) -> Average | None:
    try:
        values = {row["metric"]: float(row["actualValue"]) for row in group}
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: a metric is no number: {error}") from None
    mean = next((values[name] for name in _LATENCY if name in values), None)
    if mean is None:
        return None
    model = group[0].get("benchmarkModel") or {}
    label = " ".join(str(model[k]) for k in ("name", "backend", "quantization") if model.get(k))
    return Average(
        model=label or path.stem,
        device=_device(group[0].get("deviceInfo") or {}),
        source=f"minibench {path.name}",
        mean_ms=mean,
        load_ms=values.get("model_load_time(ms)"),
        peak_rss_mb=values.get("ram_pss_usage(mb)"),
        notes=("a mean as reported: no percentiles, no interval; peak_rss_mb is PSS at the end",),
    )


def _device(info: dict[str, Any]) -> Device:
    system = str(info.get("os", ""))
    kind: DeviceKind = "apple" if re.search(r"ios|mac|darwin", system, re.IGNORECASE) else "android"
    name = str(info.get("device") or info.get("model") or "unknown")
    return Device(kind=kind, name=name, os=system, arch=str(info.get("arch", "")))

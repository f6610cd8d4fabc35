"""The runner's JSON line, and the results of the schema that are made from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ibtm.errors import DeviceError
from edge_ibtm.probe.host import Execution
from edge_ibtm.probe.parity import judge
from edge_ibtm.probe.phone import Condition, Phone
from edge_ibtm.probe.results import latency_of, ratios, unique_labels
from edge_ibtm.probe.schema import Device, ProbeRun, Profile


@dataclass(frozen=True)
class Measured:
    """What came back from a phone. samples in ms, per model; report: the runner's own."""

    files: list[Path]
    report: dict[str, Any]
    samples: list[list[float]]
    outputs: list[list[Any]]
    profiles: list[Profile | None]
    phone: Phone
    serial: str
    before: Condition
    after: Condition
    placement: str


def parse_report(stdout: str) -> dict[str, Any]:
    """The last JSON line of the runner's stdout. DeviceError when there is none: the run was cut short."""
    for line in reversed(stdout.strip().splitlines()):
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict) and report.get("runner") == "edge_ibtm_runner":
            return report
    raise DeviceError(f"the runner printed no result, only: {stdout.strip()[-200:] or 'nothing'}; run it again")


def assemble(measured: Measured, here: list[Execution], expected: Sequence[Sequence[Any]] | None) -> ProbeRun:
    """Results of the schema, outputs judged against this machine's runtime and eager."""
    device = _device(measured)
    labels = unique_labels([file.stem for file in measured.files])
    results = []
    for index, (file, label) in enumerate(zip(measured.files, labels, strict=True)):
        row = measured.report["models"][index]
        parity, notes = judge(measured.outputs[index], here[index], expected[index] if expected else None)
        results.append(
            latency_of(
                file,
                label,
                device,
                measured.samples[index],
                threads=measured.report["threads"],
                placement=measured.placement,
                load_ms=row["load_ms"],
                init_ms=row["init_ms"],
                first_ms=row["first_ms"],
                peak_rss_mb=measured.report["peak_rss_kb"] * 1024 / 1e6,
                rss_growth_mb=row["rss_growth_kb"] * 1024 / 1e6,
                warmup_runs=row["warmup_runs"],
                stable=row["stable"],
                parity=parity,
                profile=measured.profiles[index],
                notes=(*notes, *_warnings(measured)),
            )
        )
    return ProbeRun(results=tuple(results), ratios=ratios(results))


def _device(measured: Measured) -> Device:
    phone, report = measured.phone, measured.report
    facts = {"sdk": phone.sdk, "soc": phone.soc, "cpus": ",".join(f"{cpu:g}" for cpu in report["cpus"])}
    for when, state in (("before", measured.before), ("after", measured.after)):
        known = {"battery_percent": state.battery, "battery_or_skin_c": state.temperature, "throttling": state.status}
        facts |= {f"{name}_{when}": str(value) for name, value in known.items() if value is not None}
    return Device(
        kind="android",
        name=phone.name,
        os=f"Android {phone.android}",
        arch=phone.abis[0],
        cores=phone.cores or None,
        serial=measured.serial,
        runtime=f"executorch {report['executorch']}",
        cpu_mhz_before=tuple(report["cpu_mhz_before"]),
        cpu_mhz_after=tuple(report["cpu_mhz_after"]),
        thermal_c_before=measured.before.zones or report["thermal_c_before"],
        thermal_c_after=measured.after.zones or report["thermal_c_after"],
        facts={key: value for key, value in facts.items() if value},
    )


def _warnings(measured: Measured) -> list[str]:
    """Circumstances that make the figures doubtful."""
    found = []
    if (measured.after.status or 0) > 1:
        found.append(f"the phone throttled while it ran (thermal status {measured.after.status}): cool it and repeat")
    if measured.before.battery is not None and measured.before.battery < 20:
        found.append(f"battery at {measured.before.battery} %: phones slow down when it is low")
    start, end = measured.report["cpu_mhz_before"], measured.report["cpu_mhz_after"]
    if start and end and max(end) < 0.9 * max(start):
        found.append(f"the fastest clock fell from {max(start):.0f} to {max(end):.0f} MHz during the run")
    return found

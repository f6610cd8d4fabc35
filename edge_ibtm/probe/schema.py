"""One results schema for every place a model is probed: host, cuda, android, apple, emulated.

A result is one of three shapes, told apart by `kind`:

    latency    percentiles of single runs of one artifact on one real device
    average    a mean that another tool reported: no percentile can be derived from it
    emulated   parity and instruction counts under an emulator; the class has no field that could hold a
    latency

`ProbeRun` is what a command writes: the results of one run and the ratios between them. All times are
milliseconds, all memory is MB (10^6 bytes). JSON schema: `python -m edge_ibtm.probe.schema`.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from edge_ibtm.errors import UsageError

DeviceKind = Literal["host", "cuda", "android", "apple", "emulated"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Device(_Record):
    """On what a result was taken. `before` and `after` readings belong to the timed part."""

    kind: DeviceKind
    name: str = Field(description="CPU, GPU or phone model")
    os: str = ""
    arch: str = ""
    cores: int | None = None
    serial: str | None = None
    runtime: str = Field(default="", description="runtime and version, e.g. 'executorch 1.5.1'")
    load_average_before: float | None = None
    load_average_after: float | None = None
    cpu_mhz_before: tuple[float, ...] = ()
    cpu_mhz_after: tuple[float, ...] = ()
    thermal_c_before: dict[str, float] = {}
    thermal_c_after: dict[str, float] = {}
    facts: dict[str, str] = {}


class Parity(_Record):
    """Outputs of the probed artifact against a reference."""

    reference: str
    max_abs: float
    sqnr_db: float | None = Field(default=None, description="null: the outputs are identical")
    identical: bool
    ok: bool
    limit: str = ""


class OperatorTime(_Record):
    """One row of a profile, times per inference."""

    name: str
    backend: str = Field(description="delegate that ran it, or 'portable' for a kernel outside every delegate")
    ms: float
    calls: float
    share: float = Field(description="of the sum over all operators, 0..1")


class Profile(_Record):
    """Where the time of one inference goes (ETDump). Tracing slows the run: shares count, not totals."""

    operators: tuple[OperatorTime, ...]
    total_ms: float
    outside_ms: float = Field(description="time in kernels outside every delegate")
    runs: int


class _Result(_Record):
    schema_version: Literal[1] = 1
    model: str = Field(description="label: file stem or model name")
    device: Device
    file: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    source: str = Field(default="edge-ibtm", description="which tool took the figures")
    notes: tuple[str, ...] = ()


class _Timed(_Result):
    emulated: Literal[False] = False
    threads: int | None = None
    placement: str = Field(default="all", description="cores the run was pinned to: all, big, little or a CPU list")
    load_ms: float | None = Field(default=None, description="until the model is ready to run, init included")
    init_ms: float | None = Field(
        default=None, description="part of load_ms that prepares the method and its delegates"
    )
    first_ms: float | None = Field(default=None, description="the first run after loading")
    peak_rss_mb: float | None = Field(default=None, description="peak resident memory of the process")
    rss_growth_mb: float | None = Field(default=None, description="of which this model's load and first run added")
    parity: Parity | None = None
    profile: Profile | None = None


class Latency(_Timed):
    """Latency of one artifact, batch as given, one run a sample, warm."""

    kind: Literal["latency"] = "latency"
    p50_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    mean_ms: float
    median_interval_ms: tuple[float, float] = Field(description="confidence interval of the median")
    confidence: float = Field(
        default=0.95, description="of median_interval_ms; what the samples really reach, at most 0.95"
    )
    samples_ms: tuple[float, ...] = Field(default=(), description="every warm run in the order it was taken")
    warmup_runs: int = 0
    stable: bool | None = Field(default=None, description="the warm-up ended because successive medians agreed")


class Average(_Timed):
    """A mean latency that another tool reported."""

    kind: Literal["average"] = "average"
    mean_ms: float


class Emulated(_Result):
    """An artifact under an emulator: what it computes and how many instructions it takes, never how long."""

    kind: Literal["emulated"] = "emulated"
    emulated: Literal[True] = True
    instructions: int | None = Field(
        None, description="guest instructions of one warm inference: a cost proxy, not time"
    )
    parity: Parity | None = None


Result = Annotated[Latency | Average | Emulated, Field(discriminator="kind")]


class Ratio(_Record):
    """value = p50 of `model` / p50 of `baseline`, interval by paired bootstrap over rounds."""

    model: str
    baseline: str
    value: float
    low: float
    high: float
    rounds: int
    confidence: float = 0.95


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class ProbeRun(_Record):
    """Everything one probe command measured, in the order the artifacts were given."""

    schema_version: Literal[1] = 1
    taken: str = Field(default_factory=_now, description="UTC, ISO 8601")
    results: tuple[Result, ...]
    ratios: tuple[Ratio, ...] = ()


def json_schema() -> dict[str, Any]:
    """JSON schema of a results file: a `ProbeRun` or a single result."""
    return TypeAdapter(ProbeRun | Result).json_schema()


def read_results(path: str | Path) -> ProbeRun:
    """Read a results file: a run, a single result, or a log whose last line is one. UsageError for anything
    else.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no results file {path}; write one with `edge-ibtm probe FILE --json {path}`")
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    data = _parse(text)
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no JSON result of `edge-ibtm probe`; take one with `probe FILE --json OUT`")
    try:
        if "results" in data:
            return ProbeRun.model_validate(data)
        return ProbeRun(results=(TypeAdapter(Result).validate_python(data),))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path} is not a probe result: {where or 'top level'}: {first['msg']} "
            f"({error.error_count()} faults; schema: python -m edge_ibtm.probe.schema)"
        ) from None


def _parse(text: str) -> Any:
    for candidate in (text, text.splitlines()[-1] if text else ""):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return None


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))

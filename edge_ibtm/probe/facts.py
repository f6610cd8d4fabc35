"""What the machine at hand is and what state it is in: CPU, cores, load, clocks, temperatures, memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_CPU = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
_THERMAL = Path("/sys/class/thermal")


def cpu_model() -> str:
    """Marketing name of the CPU, or the architecture when the system does not tell.

    On x86 with family, model, widest vectors and whether it multiplies 8-bit values by VNNI, which int8 is fast with:
    virtual machines give one name to several generations.
    """
    known: dict[str, str] = {}
    for line in _read(_CPUINFO).splitlines():
        key, _, value = line.partition(":")
        known.setdefault(key.strip(), value.strip())
    name = known.get("model name") or known.get("Hardware") or platform.processor() or platform.machine()
    if "cpu family" not in known:
        return name
    flags = known.get("flags", "").split()
    vectors = next((v for v in ("avx512f", "avx2", "avx") if v in flags), "sse")
    vectors += ", vnni" if {"avx512_vnni", "avx_vnni"} & set(flags) else ""
    return f"{name} (family {known['cpu family']} model {known.get('model', '?')}, {vectors})"


def usable_cores() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Load of the last minute, None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_mhz() -> tuple[float, ...]:
    """Current frequency of each CPU in MHz (cpufreq, else /proc/cpuinfo); empty when not readable."""
    files = sorted(_CPU.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"), key=lambda f: int(f.parts[-3][3:]))
    rates = tuple(float(text) / 1000 for f in files if (text := _read(f).strip()))
    if rates:
        return rates
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    return tuple(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))


def thermal_c() -> dict[str, float]:
    """Temperature of each thermal zone in degrees Celsius; empty when not readable."""
    zones = {}
    for zone in sorted(_THERMAL.glob("thermal_zone*")):
        text = _read(zone / "temp").strip()
        if text.lstrip("-").isdigit():
            zones[f"{zone.name}:{_read(zone / 'type').strip()}"] = int(text) / 1000
    return zones


def memory_mb(field: str) -> float | None:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in MB; None off Linux."""
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def reset_peak() -> None:
    """Let `VmHWM` start again from what is resident now, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss_mb() -> float | None:
    """Peak resident memory of this process since it began, in MB.

    Linux hands the parent's `ru_maxrss` on to a child, so `VmHWM` is asked first.
    """
    own = memory_mb("VmHWM")
    if own is not None:
        return own
    import resource

    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def version_of(package: str) -> str:
    """Installed version of a Python package, 'missing' when it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    return _guard(lambda: version(package), PackageNotFoundError, "missing")


def _guard(call: Callable[[], T], error: type[Exception], default: T) -> T:
    try:
        return call()
    except error:
        return default


def _read(path: Path) -> str:
    return _guard(lambda: path.read_text(errors="replace"), OSError, "")


def condition() -> dict[str, Any]:
    """What a latency may depend on at this moment: load average, clocks in MHz, temperatures in Celsius, CPU seconds."""
    return {"load": load_average(), "mhz": cpu_mhz(), "thermal": thermal_c(), "cpu": cpu_seconds()}


def cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds until now: of the clock, of CPU that the whole machine spent, of CPU that this process spent; None off Linux."""
    first = _read(Path("/proc/stat")).partition("\n")[0].split()
    if first[:1] != ["cpu"]:
        return None
    user, nice, system, _idle, _wait, *interrupts = (int(ticks) for ticks in first[1:9])
    return time.monotonic(), (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK"), time.process_time()


def others_cores(before: Sequence[float] | None, after: Sequence[float] | None) -> float | None:
    """How many cores other processes kept busy between two readings of `cpu_seconds`."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    clock, machine, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (machine - own) / clock)

"""What a phone is and how it feels: ABI, Android version, space, battery, temperatures, big and little cores."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_ibtm.errors import DeviceError, UsageError
from edge_ibtm.probe.adb import Adb

_GATED = re.compile(r"skin|battery|quiet|case", re.IGNORECASE)
_CUT = "====edge-ibtm===="
_FACTS = (
    "getprop ro.product.manufacturer",
    "getprop ro.product.model",
    "getprop ro.product.cpu.abilist",
    "getprop ro.product.cpu.abi",
    "getprop ro.build.version.release",
    "getprop ro.build.version.sdk",
    "getprop ro.soc.model",
    "nproc",
)
_FREQUENCIES = (
    "for f in /sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq; do "
    '[ -r "$f" ] && echo "$f $(cat "$f")"; done; true'
)
_ZONES = (
    "for z in /sys/class/thermal/thermal_zone*; do "
    '[ -r "$z/temp" ] && echo "$(cat "$z/type") $(cat "$z/temp" 2>/dev/null)"; done; true'
)


@dataclass(frozen=True)
class Phone:
    """Fixed facts. abis in the phone's order of preference; max_khz: highest clock of each CPU, where
    readable.
    """

    name: str
    abis: tuple[str, ...]
    android: str
    sdk: str
    soc: str
    cores: int
    max_khz: dict[int, int]


@dataclass(frozen=True)
class Condition:
    """State of the moment. battery in percent; temperatures in degrees Celsius; status: Android's throttling
    0..6.
    """

    battery: int | None
    plugged: bool | None
    temperature: float | None
    status: int | None
    zones: dict[str, float]


def read_phone(adb: Adb) -> Phone:
    """Ask the phone what it is, in one round trip."""
    script = f"; echo {_CUT}; ".join(f"{command} 2>/dev/null" for command in (*_FACTS, _FREQUENCIES))
    parts = [part.strip() for part in adb.shell(script, check=False).split(_CUT)]
    maker, model, abilist, abi, android, sdk, soc, cores, clocks = (parts + [""] * 9)[:9]
    if not abilist and not abi:
        raise DeviceError(f"{adb.serial} does not say its ABI (getprop); is it an Android phone?")
    return Phone(
        name=" ".join(part for part in (maker, model) if part) or adb.serial,
        abis=tuple((abilist or abi).split(",")),
        android=android,
        sdk=sdk,
        soc=soc,
        cores=int(cores) if cores.isdigit() else 0,
        max_khz=_clocks(clocks),
    )


def _clocks(text: str) -> dict[int, int]:
    found = re.findall(r"/cpu(\d+)/cpufreq/cpuinfo_max_freq (\d+)", text)
    return {int(cpu): int(khz) for cpu, khz in sorted(found, key=lambda pair: int(pair[0]))}


def free_mb(adb: Adb, folder: str) -> float:
    """Free space of the file system that holds `folder`, MB."""
    line = adb.shell(f"df -k {shlex.quote(folder)}").strip().splitlines()[-1].split()
    numbers = [int(word) for word in line if word.isdigit()]
    if len(numbers) < 3:
        raise DeviceError(f"cannot read the free space of {folder} from `df -k`: {' '.join(line)}")
    return numbers[2] * 1024 / 1e6


def read_condition(adb: Adb) -> Condition:
    """Battery, throttling and temperatures now. What the phone does not tell is None."""
    script = f"dumpsys battery 2>/dev/null; echo {_CUT}; dumpsys thermalservice 2>/dev/null; echo {_CUT}; {_ZONES}"
    battery, service, zones = [*adb.shell(script, check=False).split(_CUT), "", "", ""][:3]
    level, tenths = _field(battery, "level"), _field(battery, "temperature")
    plugged = re.findall(r"powered: (true|false)", battery)
    read = _zones(zones)
    warm = [celsius for zone, celsius in read.items() if _GATED.search(zone)]
    if tenths is not None:
        warm.append(tenths / 10)
    status = re.search(r"Thermal Status: (\d+)", service)
    return Condition(
        battery=level,
        plugged="true" in plugged if plugged else None,
        temperature=max(warm) if warm else None,
        status=int(status[1]) if status else None,
        zones=read,
    )


def _field(text: str, name: str) -> int | None:
    found = re.search(rf"^\s*{name}: (-?\d+)\s*$", text, re.MULTILINE)
    return int(found[1]) if found else None


def _zones(text: str) -> dict[str, float]:
    """Zone -> Celsius. Kernels report milli-degrees, some older ones degrees; absurd readings are dropped."""
    zones: dict[str, float] = {}
    for number, (name, value) in enumerate(re.findall(r"^(\S+) (-?\d+)$", text, re.MULTILINE)):
        celsius = int(value) / 1000 if abs(int(value)) > 200 else float(value)
        if -40 < celsius < 150:
            zones[name if name not in zones else f"{name}#{number}"] = celsius
    return zones


def wait_until_cool(
    read: Callable[[], Condition], limit: float, patience: float, say: Callable[[str], None]
) -> Condition:
    """Wait until battery and skin are at most `limit` Celsius and nothing is throttled, for up to `patience`
    seconds.

    A phone that tells no temperature passes. DeviceError when it stays warm.
    """
    deadline = time.monotonic() + patience
    while True:
        now = read()
        if (now.temperature is None or now.temperature <= limit) and (now.status or 0) <= 1:
            return now
        state = f"{now.temperature} Celsius, throttling status {now.status or 0}"
        if time.monotonic() >= deadline:
            raise DeviceError(
                f"the phone is too warm for figures that mean something: {state}, the limit is {limit} Celsius and "
                f"status 1, after {patience:.0f} s; let it cool (screen off, out of its case), or raise --max-temperature"
            )
        say(f"waiting for the phone to cool: {state}, limit {limit}")
        time.sleep(min(5.0, max(0.05, patience / 20)))


def choose_cores(cores: str, phone: Phone) -> tuple[int, ...]:
    """CPUs to pin to; empty for all. big: every CPU faster than the slowest cluster. little: the slowest
    cluster.

    Errors: UsageError (no such CPU, nonsense), DeviceError (clocks not readable).
    """
    if cores == "all":
        return ()
    if cores in ("big", "little"):
        if not phone.max_khz:
            raise DeviceError(f"{phone.name} does not tell its clocks; name the CPUs instead: --cores 4,5,6,7")
        slowest = min(phone.max_khz.values())
        big = tuple(cpu for cpu, khz in phone.max_khz.items() if khz > slowest)
        little = tuple(cpu for cpu, khz in phone.max_khz.items() if khz == slowest)
        return (big or little) if cores == "big" else little
    try:
        chosen = tuple(int(part) for part in cores.split(","))
    except ValueError:
        raise UsageError(f"--cores {cores!r}: give all, big, little, or CPUs such as 4,5") from None
    wrong = [cpu for cpu in chosen if cpu < 0 or (phone.cores and cpu >= phone.cores)]
    if wrong:
        raise UsageError(f"--cores {cores}: {phone.name} has CPUs 0 to {phone.cores - 1}")
    return chosen

"""Is everything here that edge-ibtm needs? Versions against a known-good table, tools, phones; what to do if
not.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from edge_ibtm.errors import EdgeIBTMError
from edge_ibtm.probe.facts import version_of

State = Literal["ok", "missing", "wrong", "skipped"]
# Versions that were tried together; a different one may work, and says so.
KNOWN_GOOD = {
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "timm": "1.0.31",
    "executorch": "1.5.1",
    "torchao": "0.18",
    "coremltools": "9.0",
}
_TOOLS = {
    "adb": ("probing Android phones", "apt install adb, or pip install 'edge-ibtm[android]'"),
    "qemu-aarch64": ("Arm proof without a phone", "apt install qemu-user"),
    "aarch64-linux-gnu-g++": ("building the phone's runner", "apt install g++-aarch64-linux-gnu"),
    "cmake": ("building the runner", "apt install cmake, or pip install cmake"),
    "g++": ("building the runner for this machine", "apt install g++"),
    "gcc": ("counting Arm instructions", "apt install gcc"),
}


@dataclass(frozen=True)
class Check:
    """One line: state is ok, missing (an optional part), wrong (will not work) or skipped (not for this
    system).
    """

    name: str
    state: State
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """All checks, in the order they are printed. Nothing is changed and no heavy package is imported."""
    return [
        _python(),
        *(_package(name, good) for name, good in KNOWN_GOOD.items()),
        *(_tool(name, *words) for name, words in _TOOLS.items()),
        _phones(),
        _bundle(),
        _xcode(),
        _cuda(),
    ]


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        return Check("python", "ok", found)
    return Check("python", "wrong", found, "executorch and this package need Python 3.11")


def _package(name: str, good: str) -> Check:
    found = version_of(name)
    if found == "missing":
        return Check(name, "wrong", found, f"pip install '{name}=={good}{'' if good.count('.') > 1 else '.*'}'")
    if (found.partition("+")[0] + ".").startswith(good + "."):
        return Check(name, "ok", found)
    advice = f"tried with {good}; if something fails: pip install -e . in the checkout restores it"
    return Check(name, "wrong" if _older(found, good) else "ok", found, advice)


def _older(found: str, good: str) -> bool:
    """Whether `found` comes before `good`, by the numbers at the front of each part."""

    def numbers(version: str) -> list[int]:
        parts = version.partition("+")[0].split(".")
        return [int("".join(c for c in part if c.isdigit()) or 0) for part in parts]

    return numbers(found) < numbers(good)


def _tool(name: str, purpose: str, advice: str) -> Check:
    path = shutil.which(name)
    if path is None and name == "qemu-aarch64" and (path := shutil.which("qemu-aarch64-static")):
        return Check(name, "ok", path, f"instructions are not counted with the static one; for that: {advice}")
    if path is None and name == "adb":
        return _guarded(name, _bundled_adb, Check(name, "missing", f"needed for {purpose}", advice))
    return Check(name, "ok", path) if path else Check(name, "missing", f"needed for {purpose}", advice)


def _bundled_adb() -> Check:
    from edge_ibtm.probe.adb import find_adb

    return Check("adb", "ok", find_adb())


def _phones() -> Check:
    from edge_ibtm.probe.adb import find_adb, list_devices

    def look() -> Check:
        found = list_devices(find_adb())
        if not found:
            advice = "connect one with USB debugging on; without a phone: edge-ibtm verify FILE --arch aarch64"
            return Check("phones", "missing", "no phone is connected", advice)
        states = ", ".join(f"{serial} ({state})" for serial, state in found.items())
        unready = any(state != "device" for state in found.values())
        return Check(
            "phones", "wrong" if unready else "ok", states, "unlock it and allow USB debugging" if unready else ""
        )

    return _guarded("phones", look, Check("phones", "missing", "adb is missing", _TOOLS["adb"][1]))


def _bundle() -> Check:
    from edge_ibtm import runner

    folders = sorted(runner.cache_folder().glob("runner-aarch64-*"))
    built = [bundle for folder in folders if (bundle := runner.read_bundle(folder))]
    if built:
        return Check("aarch64 runner", "ok", str(built[-1].folder))
    return Check("aarch64 runner", "missing", "not built yet", "edge-ibtm runner build --arch aarch64")


def _xcode() -> Check:
    if platform.system() != "Darwin":
        return Check(
            "xcode", "skipped", "not a Mac; .mlpackage files are checked numerically: edge-ibtm verify FILE.mlpackage"
        )
    if shutil.which("xcrun") is None:
        return Check("xcode", "missing", "needed for mac and ios probes", "install Xcode, then xcode-select --install")
    return Check("xcode", "ok", _first_line(["xcodebuild", "-version"]))


def _cuda() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check("cuda", "skipped", "no NVIDIA driver; probes and training use the CPU")
    return Check("cuda", "ok", _first_line(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]))


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} failed: {error}"
    return ((done.stdout or done.stderr).strip().splitlines() or ["no answer"])[0]


def _guarded(name: str, check: Callable[[], Check], otherwise: Check) -> Check:
    """A check whose own failure is a finding, not a crash."""
    try:
        return check()
    except EdgeIBTMError as error:
        return otherwise if "missing" in str(error) else Check(name, "wrong", str(error))


def table(checks: list[Check]) -> str:
    """One line a check, with what to do where it is not ok."""
    width = max(len(each.name) for each in checks)
    lines = [
        f"{each.state:<8} {each.name:<{width}}  {each.found}" + (f"  -> {each.advice}" if each.advice else "")
        for each in checks
    ]
    wrong = sum(each.state == "wrong" for each in checks)
    lines.append("everything needed is here" if not wrong else f"{wrong} things are wrong: see the arrows above")
    return "\n".join(lines)


def json_line(checks: list[Check]) -> str:
    """The checks as one line of JSON."""
    return json.dumps({"ok": all(c.state != "wrong" for c in checks), "checks": [asdict(c) for c in checks]})

"""docs/ARM.md, written from benchmarks/results/arm_*.json by `python benchmarks/arm.py --report`."""

from __future__ import annotations

from pathlib import Path

from edge_ibtm.probe.schema import Emulated, ProbeRun, read_results

_HEAD = """# Merged models on Arm, without a phone

Made by `python benchmarks/arm.py` from `benchmarks/results/arm_*.json`; do not edit. Each artifact runs in the Arm runner under
QEMU's user emulation, one thread. Instructions: guest instructions of one warm inference, what a second run adds to the
process; they repeat to 1e-4 and compare artifacts on Arm, but they are not time: caches, memory and pipelines are not in them.
Parity: outputs against the same file in this machine's x86 runtime; `ok` as `edge-ibtm verify FILE --arch aarch64` judges it.
"""
_COLUMNS = """| artifact | MB | M instructions | against unmerged | against fp32 | difference to x86 | parity |
|---|--:|--:|--:|--:|--:|---|
"""


def page(folder: Path) -> str:
    """The whole file, a section for each arm_<model>.json in `folder`."""
    runs = [(path, read_results(path)) for path in sorted(folder.glob("arm_*.json")) if ".part" not in path.name]
    return _HEAD + "".join(section(path.stem.removeprefix("arm_"), run) for path, run in runs)


def section(model: str, run: ProbeRun) -> str:
    """The table of one model; its results are fp32 and int8, unmerged and then merged."""
    found = [result for result in run.results if isinstance(result, Emulated)]
    device = found[0].device
    host = f"{device.name}, {device.runtime}, {device.facts['emulator']}; taken {run.taken}"
    rows = "".join(_table_row(result, found) for result in found)
    notes = "".join(f"- {result.model}: {'; '.join((_limit(result), *result.notes))}\n" for result in found)
    return f"\n## {model}\n\n{host}. Command: `python benchmarks/arm.py --model {model}`.\n\n{_COLUMNS}{rows}\n{notes}"


def _limit(result: Emulated) -> str:
    return f"parity asked for: {result.parity.limit}" if result.parity else "parity not asked for"


def _table_row(result: Emulated, found: list[Emulated]) -> str:
    stem, precision = result.model.rsplit("-", 1)
    unmerged = next(each for each in found if each.model.endswith(precision))
    fp32 = next((each for each in found if each.model == f"{stem}-fp32"), None)
    against_base = "" if unmerged is result else _ratio(result, unmerged)
    against_fp32 = "" if fp32 is None or fp32 is result else _ratio(result, fp32)
    cells = [f"{(result.bytes or 0) / 1e6:.1f}", _millions(result), against_base, against_fp32, *_parity(result)]
    return f"| {result.model} | {' | '.join(cells)} |\n"


def _millions(result: Emulated) -> str:
    return "not counted" if result.instructions is None else f"{result.instructions / 1e6:.1f}"


def _ratio(result: Emulated, base: Emulated) -> str:
    return f"{result.instructions / base.instructions:.3f}" if result.instructions and base.instructions else ""


def _parity(result: Emulated) -> tuple[str, str]:
    parity = result.parity
    if parity is None:
        return "", "not compared"
    difference = "identical" if parity.identical else f"{parity.max_abs:.2g} ({parity.sqnr_db or 0:.1f} dB)"
    return difference, "ok" if parity.ok else "WRONG"


def row(result: Emulated) -> str:
    """One result as a line of progress."""
    difference, verdict = _parity(result)
    return f"{result.model:<36} {_millions(result):>9} M instructions, difference to x86 {difference}, {verdict}"

"""benchmarks/arm.py: an interrupted run goes on where it ended, and docs/ARM.md is made from its files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from edge_ibtm.probe.schema import Device, Emulated, Parity

LABELS = ["m-fp32", "m-int8", "m-tome-0.5-fp32", "m-tome-0.5-int8"]
DEVICE = Device(kind="emulated", name="qemu", runtime="executorch 1", facts={"emulator": "7.2"})


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import arm

    return arm


def result(label: str, instructions: int) -> Emulated:
    parity = Parity(reference="x86", max_abs=0.1, sqnr_db=20.0, identical=False, ok="int8" not in label, limit="none")
    return Emulated(model=label, device=DEVICE, bytes=10**6, instructions=instructions, parity=parity)


def test_it_goes_on_where_it_was_interrupted(arm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []

    def measure(request: object, done: set[str], folder: Path) -> Iterator[Emulated]:
        asked.append(done)
        for index, label in enumerate(LABELS):
            if label not in done:
                yield result(label, (index + 1) * 10**6)
            if len(asked) == 1 and index == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(arm, "measure", measure)
    request, out = arm.Request("m", 0.5, "tome", None), tmp_path / "arm_m.json"
    with pytest.raises(KeyboardInterrupt):
        arm.run(request, out)
    assert not out.exists()
    arm.run(request, out)
    assert asked == [set(), set(LABELS[:2])]
    assert [path.name for path in tmp_path.iterdir()] == ["arm_m.json"]
    assert [each.model for each in arm.read_results(out).results] == LABELS
    page = arm.arm_report.page(tmp_path)
    assert "| m-tome-0.5-int8 | 1.0 | 4.0 | 2.000 | 1.333 | 0.1 (20.0 dB) | WRONG |" in page
    assert "python benchmarks/arm.py --model m" in page


def test_changed_code_starts_again(arm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "arm_m.000000000000.part.json"
    stale.write_text("{}")
    seen: list[set[str]] = []
    monkeypatch.setattr(arm, "measure", lambda request, done, folder: seen.append(done) or iter([result("m-fp32", 1)]))
    part = tmp_path / f"arm_m.{arm.code_stamp(arm.Request('m', 0.5, 'tome', 128))}.part.json"
    part.write_text("{}")
    arm.run(arm.Request("m", 0.5, "tome", None), tmp_path / "arm_m.json")
    assert not part.exists(), "of another image size"
    assert seen == [set()] and not stale.exists()

"""Gates, the table, the files, and the README's table made from report.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from edge_ibtm.cache import Entry
from edge_ibtm.config import Recipe, VerifySection
from edge_ibtm.errors import GateError, UsageError
from edge_ibtm.gates import Gate, all_gates, limits_of
from edge_ibtm.report import MARKS, Report, Row, fill_readme, write_report
from edge_ibtm.report_text import COLUMNS, cells, print_report, table_block


def report(drop: float = 0.5) -> Report:
    """A report with one eager and one artifact row."""
    rows = [
        Row("base", 97.5, 400, 250_000_000, 5_000_000, 20_000_000),
        Row("m.pte", 97.0, 400, 200_000_000, 5_000_000, 6_000_000, 33.3, 2, 400, 7, 4.5, 5.0, 6.0, 30.0, 9.0, 80.0, 1.25),
    ]
    gates = [Gate("m.pte SQNR", 33.3, 28, "dB", True), Gate("top-1 loss, x", drop, 2, "points", False)]
    figures = {
        "data": {"images": {"test": 400}}, "chance_percent": 10.0, "libraries": "torch=2", "artifacts": [], "run": "r",
    }  # fmt: skip
    return Report("mobilevit_s", rows, gates, ["a note"], figures)


def test_gate_directions_and_nan() -> None:
    assert Gate("a", 80, 80, "dB", True).ok and not Gate("a", 79.9, 80, "dB", True).ok
    assert Gate("a", 2, 2, "points", False).ok and not Gate("a", 2.1, 2, "points", False).ok
    assert not Gate("a", math.nan, 80, "dB", True).ok and not Gate("a", math.nan, 2, "points", False).ok


def test_require_names_every_missed_gate() -> None:
    assert report().require().ok
    with pytest.raises(GateError, match=r"1 gate missed: top-1 loss, x: 3.00 points \(at most 2\)"):
        report(3.0).require()


def test_default_limits_are_the_issues() -> None:
    section = VerifySection()
    assert [limits_of(section, p)["sqnr_db"] for p in ("fp32", "int8", "pal4")] == [80, 28, None]
    assert limits_of(section, "fp16") == {"sqnr_db": None, "sqnr_median_db": 40, "top1_agreement": 0.98}
    assert limits_of(section, "int8w")["sqnr_median_db"] == 28 and section.max_drop == 2


@pytest.mark.parametrize(("figures", "missed"), [
    ({}, []),
    ({"sqnr_db": 5.0}, []),
    ({"sqnr_median_db": 39.0}, ["a SQNR of the median image: 39.00 dB (at least 40)"]),
    ({"top1_agreement": 62 / 64}, ["a same class as its model: 96.88 % (at least 98)"]),
    ({"top1": 91.0}, ["top-1 loss, a against its model: 4.00 points (at most 2)"]),
])  # fmt: skip
def test_core_ml_is_judged_by_its_median_image_and_its_classes(figures: dict[str, float], missed: list[str]) -> None:
    checked = {"verified": True, "sqnr_db": 38.9, "sqnr_median_db": 57.0, "top1_agreement": 1.0, "top1": 95.0}
    record = Entry("", "", Path(), {"top1": 95.0}, "")
    verdict = Entry("", "", Path(), {**checked, **figures, "reference_top1": 95.0}, "")
    product = SimpleNamespace(name="p", file="a", stage="finetune", precision="fp16")
    done = {"base": record, "finetune": record, "verify-p": verdict}
    assert [g.text for g in all_gates(Recipe(), done, [product]) if not g.ok] == missed


def test_cells_follow_the_columns() -> None:
    values = dict(zip(COLUMNS, cells(report().to_json()["rows"][1])))
    assert values["top-1 %"] == "97.0" and values["MACs M"] == "200.0" and values["MB"] == "6.0"
    assert values["in / out"] == "400 / 7" and values["p50 ms"] == "4.50" and values["speed-up"] == "1.25x"
    assert cells(report().to_json()["rows"][0])[5:] == ["", "", "", "", ""]


def test_table_fits_a_terminal_of_100_columns() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    values = report().to_json()
    values["rows"][1]["name"] = "merged.xnnpack.fp32.pte"
    print_report(values, console)
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert any("merged.xnnpack.fp32.pte" in line and "1.25x" in line for line in lines), "one row, one line"


def test_files_hold_every_figure(tmp_path: Path) -> None:
    write_report(report(3.0), tmp_path)
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["ok"] is False and values["rows"][1]["sqnr_db"] == 33.3
    assert "GATES MISSED" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "m.pte" in page and "missed" in page
    assert not list(tmp_path.glob(".*"))


def test_readme_table_is_made_from_the_report(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    fill_readme(tmp_path, readme)
    text = readme.read_text()
    assert "old" not in text and table_block(report().to_json()).strip() in text
    assert text.startswith("before") and text.endswith("after\n")
    fill_readme(tmp_path, readme)
    assert readme.read_text() == text
    readme.write_text("no marks")
    with pytest.raises(UsageError, match="markers"):
        fill_readme(tmp_path, readme)

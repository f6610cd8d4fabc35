"""The report of the int8 benchmark, from results as it keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_report_states_every_scheme_against_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import int8

    common = {"subgraphs": 1, "agreement": 99.0, "choice": ""}
    schemes = {
        "fp32": common | {"bytes": 4_000_000, "sqnr_db": 120.0, "top1": 67.0, "samples_ms": [2.0, 4.0, 3.0]},
        "mixed": common
        | {"bytes": 1_000_000, "sqnr_db": 30.2, "top1": 66.5, "samples_ms": [1.5, 1.4, 1.6], "choice": "stem left in float"},
    }
    record = {"model": "m", "merger": "none", "images": 10, "eager_top1": 67.0, "schemes": schemes, "host": "h", "date": "d"}
    (tmp_path / "m_none.json").write_text(json.dumps(record))
    monkeypatch.setattr(int8, "RESULTS", tmp_path)
    text = int8.report()
    assert "| m | none | fp32 | 4.00 | 1.000 | 120.0 | 67.0 | 67.0 | 99.0 | 1.000 |" in text
    assert "| m | none | mixed | 1.00 | 0.250 | 30.2 | 66.5 | 67.0 | 99.0 | 0.500 |" in text
    assert "- m, none: stem left in float" in text and "Host: h, d, 10 test images." in text


def test_report_sets_qat_beside_rounding_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import int8
    import int8_qat

    monkeypatch.setattr(int8, "RESULTS", tmp_path / "int8")
    monkeypatch.setattr(int8_qat, "RESULTS", tmp_path)
    assert "qat" not in int8.report()
    for seed, qat in enumerate((64.0, 66.0)):
        top1 = {"start": 65.0, "trained": 66.0, "int8": 64.0, "mixed": 65.5, "qat": qat}
        record = {"seed": seed, "images": 10, "test_images": 20, "top1": top1, "host": "h", "date": "d"}
        (tmp_path / f"m_{seed}.json").write_text(json.dumps(record))
    text = int8.report()
    assert "| qat | 65.00 | 1.41 | 64.0, 66.0 |" in text and "| trained on, mixed | 65.50 | 0.00 | 65.5, 65.5 |" in text
    assert "2 seeds, each with 10 training images of its own" in text

"""Rounds of an interrupted phone probe, kept on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_ibtm.probe.resume import Rounds


def lines(rows: list[list[float]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_progress_file_that_was_kept_before_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_IBTM_CACHE", str(tmp_path))
    first = [[1.25, 2.5], [1.5, 2.25]]
    assert Rounds({"file": "a"}, 2).keep(lines(first) + "[1.7") == 2
    grown = [*first, [1.7, 2.0]]
    assert Rounds({"file": "a"}, 2).keep(lines(grown)) == 3, "the cable was pulled, the runner went on"
    assert Rounds({"file": "a"}, 2).keep(lines(grown)) == 3 and Rounds({"file": "a"}, 2).keep("") == 3
    rounds = Rounds({"file": "a"}, 2)
    assert rounds.keep(lines([[1.6, 2.1]])) == 4, "another start of the runner"
    assert rounds.of_model(1) == [2.5, 2.25, 2.0, 2.1]

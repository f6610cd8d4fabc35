"""The latency benchmark's tables, and how far apart it finds the cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import latency
import latency_cores
import latency_engines
import latency_report

from edge_ibtm.probe.facts import usable_cores

HOST = {"cpu": "a CPU", "load": 0.0}


def record(cores: list[float | None]) -> dict[str, Any]:
    samples = {"ours": [2.0, 2.0, 4.0, 4.0], "ibtm": [1.0, 1.0, 3.0, 3.0]}
    results = {name: {"samples": taken, "load_ms": 1.0} for name, taken in samples.items()}
    facts = {"ours": {"macs": 10, "bytes": 10**6, "subgraphs": 1}, "ibtm": {"macs": 8, "bytes": 10**6, "subgraphs": 1}}
    return {
        "model": "m", "size": 32, "threads": 2, "cores": "any", "host": HOST, "date": "2026-12-01", "facts": facts,
        "results": results, "cores_ns": cores,
    }  # fmt: skip


@pytest.mark.parametrize(
    "cores, ratio",
    [([120.0, 130.0, 560.0, 570.0], "0.500 near, 0.750 far"), ([560.0] * 4, "0.625"), ([None] * 4, "0.625"), ([], "0.625")],
)
def test_rounds_with_cores_near_and_far_are_told_apart(cores: list[float | None], ratio: str) -> None:
    assert latency_report.by_rounds(record(cores), "ibtm") == ratio
    assert latency_report.by_rounds(record(cores), "unknown") == ""


def test_the_table_says_how_far_apart_cores_were() -> None:
    text = "\n".join(latency_report.table(record([120.0, 130.0, 560.0, 570.0])))
    assert "cores 120 to 570 ns apart (round trip of a byte), below 350 in 2 of 4 rounds" in text
    assert "| ibtm | 2.00 |" in text and "0.500 near, 0.750 far" in text
    assert "apart" not in "\n".join(latency_report.table(record([])))


def test_a_run_of_near_cores_says_so() -> None:
    text = "\n".join(latency_report.table({**record([120.0, 130.0, 125.0, 127.0]), "cores": "near", "dropped": 3}))
    assert "### m @ 32, 2 threads, cores that share a cache" in text and "a CPU, 4 rounds" in text
    assert "cores 120 to 130 ns apart (round trip of a byte), 3 more rounds dropped that ended otherwise" in text


@pytest.mark.parametrize("wanted, rounds", [("near", [1.0, 3.0]), ("far", [1.0]), ("any", [0.0, 1.0])])
def test_rounds_with_other_cores_are_dropped(wanted: str, rounds: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    looks = {"near": [600, 200, 600, 200, 200, 200, 600, 200, 200], "far": [200, 600, 200, 600, 600], "any": [200, 600]}[wanted]
    taken = iter(map(float, range(9)))
    monkeypatch.setattr(latency_engines, "_loaded", lambda *_: ({"a": None}, {"a": {"samples": []}}))
    monkeypatch.setattr(latency_engines, "_round", lambda *_: {"a": next(taken)})
    monkeypatch.setattr(latency_engines, "_cores_apart", lambda: float(looks.pop(0)))
    monkeypatch.setattr(latency_engines, "POLL", 0.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    request = {
        "threads": 2, "size": 8, "repeats": len(rounds), "warmup": 0, "cores": wanted,
        "variants": [{"name": "a", "engine": "executorch"}],
    }  # fmt: skip
    found = latency_engines.measure(request)
    assert found["results"]["a"]["samples"] == rounds
    assert found["dropped"] == {"near": 2, "far": 1, "any": 0}[wanted]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or usable_cores() < 2, reason="needs two cores to choose from")
def test_a_round_trip_takes_time_and_leaves_the_cores_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_cores, "TRIPS", 100)
    before = os.sched_getaffinity(0)
    trip = latency_cores.round_trip_ns()
    assert trip is not None and trip > 0
    assert os.sched_getaffinity(0) == before


def test_one_core_has_no_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert latency_cores.round_trip_ns() is None


def test_cores_that_cannot_be_told_apart_are_neither_near_nor_far(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert [latency_engines._is(None, wanted) for wanted in ("any", "near", "far")] == [True, False, False]
    monkeypatch.setattr(latency, "round_trip_ns", lambda: None)
    monkeypatch.setattr(sys, "argv", ["latency.py", "--cores", "near"])
    with pytest.raises(SystemExit) as stopped:
        latency.main()
    assert stopped.value.code == 2 and "--cores near: nothing tells here" in capsys.readouterr().err

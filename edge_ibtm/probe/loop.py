"""Timing of callables: warm-up until stable, then one timed run of each model a round, so that models can be
compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edge_ibtm.errors import UsageError
from edge_ibtm.probe.statistics import settled


@dataclass(frozen=True)
class ProbeOptions:
    """How a probe is run.

    warmup: least number of untimed runs; the warm-up goes on until the medians of two windows of 5 runs agree
    within 5 %, for at most `warmup_seconds`. samples: timed runs of each model; cut short after `seconds` of
    timing for each model, though never under 5. timeout: seconds the whole child process may take.
    """

    warmup: int = 5
    warmup_seconds: float = 10.0
    samples: int = 100
    seconds: float = 60.0
    timeout: float = 1800.0
    profile: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "profile" and not value >= (1 if name in ("samples", "timeout") else 0):
                raise UsageError(f"probe option {name} = {value} makes no sense; give a positive number")


LEAST_SAMPLES = 5


def timed_ms(run: Callable[[], Any]) -> float:
    """Wall time of one call in ms."""
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def warm_up(run: Callable[[], Any], options: ProbeOptions) -> tuple[int, bool]:
    """Run untimed until stable. Returns (runs, whether it became stable)."""
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < options.warmup or not settled(taken):
        if len(taken) >= options.warmup and time.perf_counter() - start > options.warmup_seconds:
            return len(taken), False
        taken.append(timed_ms(run))
    return len(taken), True


def sample_rounds(runs: Sequence[Callable[[], Any]], options: ProbeOptions) -> list[list[float]]:
    """Per callable, one timed run a round. The order rotates, so that no model always follows the same other
    one.
    """
    samples: list[list[float]] = [[] for _ in runs]
    deadline = time.perf_counter() + options.seconds * len(runs)
    for number in range(options.samples):
        if number >= LEAST_SAMPLES and time.perf_counter() > deadline:
            break
        for step in range(len(runs)):
            index = (number + step) % len(runs)
            samples[index].append(timed_ms(runs[index]))
    return samples

"""How far apart the first two usable cores are: `python benchmarks/latency_cores.py` prints nanoseconds, or `null`.

What a virtual machine calls two cores may share a cache today and none tomorrow; every operator that two threads share
then waits for the other's numbers. The round trip of one byte between two processes, one on each core, tells which it is.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import statistics
import time

NEAR = 350  # ns; below it two cores share a cache: 210 on a Zen 5's, 620 between two of its caches
TRIPS, TIMES = 5000, 5
THERE, BACK = 0, 256  # bytes on cache lines of their own


def round_trip_ns() -> float | None:
    """Median round trip of a byte, ns, the interpreter's own 50 to 100 ns included.

    None with fewer than two cores, and where the system (macOS) puts no process on a core of one's choice.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(usable) < 2:
        return None
    cores = sorted(usable)[:2]
    memory = mmap.mmap(-1, 4096)
    other = multiprocessing.get_context("fork").Process(target=_answer, args=(memory, cores[1]), daemon=True)
    other.start()
    os.sched_setaffinity(0, {cores[0]})
    taken, signal = [], 1
    for _ in range(TIMES):
        start = time.perf_counter()
        for _ in range(TRIPS):
            memory[THERE] = signal
            while memory[BACK] != signal:
                pass
            signal = 3 - signal
        taken.append(1e9 * (time.perf_counter() - start) / TRIPS)
    other.join()
    os.sched_setaffinity(0, usable)
    return round(statistics.median(taken), 1)


def _answer(memory: mmap.mmap, core: int) -> None:
    os.sched_setaffinity(0, {core})
    signal = 1
    for _ in range(TRIPS * TIMES):
        while memory[THERE] != signal:
            pass
        memory[BACK] = signal
        signal = 3 - signal


if __name__ == "__main__":
    print(json.dumps(round_trip_ns()))

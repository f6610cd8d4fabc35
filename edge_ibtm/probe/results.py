"""Results of the schema from samples: the one place where a `Latency` is put together, and the ratios between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_ibtm.files import sha256_of, size_of
from edge_ibtm.probe import statistics
from edge_ibtm.probe.schema import Device, Latency, Ratio

CONFIDENCE = 0.95


def latency_of(file: Path, label: str, device: Device, samples: Sequence[float], **figures: Any) -> Latency:
    """The result of one artifact. samples: ms of every warm run, in order; figures: further fields of `Latency`."""
    return Latency(model=label, device=device, **file_facts(file), **figures, **summary(samples))


def file_facts(file: Path) -> dict[str, Any]:
    """Which artifact it was: path, SHA-256 and bytes of a file, or of all files of a package."""
    return {"file": str(file), "sha256": sha256_of(file), "bytes": size_of(file)}


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """The sample statistics of a `Latency`, samples in ms."""
    low, high, reached = statistics.median_interval(samples, CONFIDENCE)
    return {
        "p50_ms": statistics.percentile(samples, 50),
        "p90_ms": statistics.percentile(samples, 90),
        "p99_ms": statistics.percentile(samples, 99),
        "min_ms": min(samples),
        "mean_ms": sum(samples) / len(samples),
        "median_interval_ms": (low, high),
        "confidence": min(CONFIDENCE, reached),
        "samples_ms": tuple(samples),
    }


def ratios(results: Sequence[Latency]) -> tuple[Ratio, ...]:
    """Every later result against the first; sample i of each belongs to round i."""
    if len(results) < 2:
        return ()
    base, *others = results
    found = []
    for other in others:
        low, high = statistics.paired_ratio_interval(other.samples_ms, base.samples_ms, CONFIDENCE)
        value = other.p50_ms / base.p50_ms
        rounds = len(base.samples_ms)
        found.append(Ratio(model=other.model, baseline=base.model, value=value, low=low, high=high, rounds=rounds))
    return tuple(found)


def unique_labels(stems: Sequence[str]) -> list[str]:
    """File stems; a stem that occurs again gets `#2`, `#3`..."""
    seen: dict[str, int] = {}
    labels = []
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
        labels.append(stem if seen[stem] == 1 else f"{stem}#{seen[stem]}")
    return labels

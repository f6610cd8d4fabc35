"""Tables of the latency benchmark, made from its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latency_cores import NEAR

from edge_ibtm.probe.statistics import median_interval, paired_ratio_interval, percentile

COMPARED = ("plain export", "onnxruntime", "ours")


def summarise(samples: list[float]) -> dict[str, float]:
    """p50, p90 and the 95 % interval of the median, ms."""
    low, high, _ = median_interval(samples)
    return {"p50": percentile(samples, 50), "p90": percentile(samples, 90), "low": low, "high": high}


def ratio(results: dict[str, Any], name: str, base: str) -> tuple[float, float, float] | None:
    """median(name) / median(base) with its 95 % interval, both of one run; None when one of them failed."""
    a, b = (results.get(n, {}).get("samples") for n in (name, base))
    if not a or not b:
        return None
    return (percentile(a, 50) / percentile(b, 50), *paired_ratio_interval(a, b))


def by_rounds(record: dict[str, Any], name: str) -> str:
    """The median of every round's ratio to `ours`; of rounds with cores near each other and far apart, where a run has both."""
    a, b = (record["results"].get(n, {}).get("samples") for n in (name, "ours"))
    if not a or not b:
        return ""
    near, far = (_rounds(record, near) for near in (True, False))
    groups = {"near": near, "far": far} if near and far else {"": range(len(a))}
    return ", ".join(f"{percentile([a[i] / b[i] for i in rounds], 50):.3f} {kind}".strip() for kind, rounds in groups.items())


def _rounds(record: dict[str, Any], near: bool) -> list[int]:
    """Rounds that began with cores near each other, or far apart."""
    return [i for i, ns in enumerate(record.get("cores_ns", [])) if ns is not None and (ns < NEAR) == near]


def _apart(record: dict[str, Any]) -> str:
    """What the rounds found of the distance between cores, for a table's head."""
    known = [ns for ns in record.get("cores_ns", []) if ns is not None]
    if not known:
        return ""
    text = f"; cores {min(known):.0f} to {max(known):.0f} ns apart (round trip of a byte), "
    if record["cores"] != "any":
        return text + f"{record['dropped']} more rounds dropped that ended otherwise"
    return text + f"below {NEAR} in {len(_rounds(record, near=True))} of {len(known)} rounds"


def table(record: dict[str, Any]) -> list[str]:
    """Markdown of one model at one number of threads."""
    results, facts = record["results"], record["facts"]
    bases = [base for base in COMPARED if base in results]
    rounds = max(len(r.get("samples", [])) for r in results.values())
    head = f"### {record['model']} @ {record['size']}, {record['threads']} thread{'s' * (record['threads'] > 1)}"
    head += {"near": ", cores that share a cache", "far": ", cores that share no cache"}.get(record.get("cores", "any"), "")
    host, over = record["host"], " | ".join("/ " + base.removesuffix(" export") for base in bases)
    lines = [
        head, "",
        f"{host['cpu']}, {rounds} rounds, load {host['load']} at the start, {record['date']}; ms, batch 1; "
        f"ratios of medians in this run; by rounds: the median of each round's ratio to ours{_apart(record)}.", "",
        f"| variant | p50 | 95 % of p50 | p90 | {over} | by rounds | MACs / base | MB | subgraphs | load ms |",
        "|---|" + "--:|" * (8 + len(bases)),
    ]  # fmt: skip
    for name, result in results.items():
        lines.append(_row(name, result, record, bases))
    return [*lines, "", *breakdown(results, facts), ""]


def _row(name: str, result: dict[str, Any], record: dict[str, Any], bases: list[str]) -> str:
    if "error" in result:
        return f"| {name} | failed: {result['error']} |" + " |" * (7 + len(bases))
    facts = record["facts"]
    s, fact = summarise(result["samples"]), facts.get(name, {})
    ratios = [ratio(record["results"], name, base) for base in bases]
    cells = [f"{r[0]:.3f}" if r else "" for r in ratios]
    macs = fact.get("macs", 0) / facts["ours"]["macs"] if "ours" in facts else 0
    rounds = by_rounds(record, name)
    size = f"{fact['bytes'] / 1e6:.1f}" if fact.get("bytes") else ""
    return (
        f"| {name} | {s['p50']:.2f} | {s['low']:.2f}-{s['high']:.2f} | {s['p90']:.2f} | {' | '.join(cells)} | {rounds} "
        f"| {macs:.3f} | {size} | {fact.get('subgraphs', '')} | {result['load_ms']:.0f} |"
    )


def breakdown(results: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """What the sites cost and save, by density.

    Uniform pooling merges to the same counts without matching: ours - uniform is what fewer tokens save, ibtm - uniform
    what deciding which tokens to merge costs, ms.
    """
    names = [n for n in results if n.startswith("ibtm, ") and "samples" in results[n]]
    if not names or "samples" not in results.get("ours", {}):
        return []
    base = percentile(results["ours"]["samples"], 50)
    lines = [
        "| density | sites | saved by fewer tokens, ms | cost of matching, ms | per site, ms | net, ms | MACs / base |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        density = name.split(", ")[1]
        other = results.get(f"uniform, {density}", {}).get("samples")
        if not other:
            continue
        ibtm, uniform, fact = percentile(results[name]["samples"], 50), percentile(other, 50), facts[name]
        cost = ibtm - uniform
        lines.append(
            f"| {density} | {fact['sites']} | {base - uniform:.2f} | {cost:.2f} | {cost / max(1, fact['sites']):.2f} "
            f"| {base - ibtm:+.2f} | {fact['macs'] / facts['ours']['macs']:.3f} |"
        )
    return lines


def lowering(record: dict[str, Any]) -> str:
    """One line on the CPU time that lowering took, plain against ours."""
    plain, ours = (record["facts"].get(n, {}).get("make_cpu_s") for n in ("plain export", "ours"))
    if not plain or not ours:
        return ""
    return f"- {record['model']}: lowering {ours:.0f} s of CPU against {plain:.0f} s plain, ratio {ours / plain:.2f}"


def write_tables(folder: Path, target: Path) -> None:
    """All records of `folder` as one Markdown file."""
    from edge_ibtm.files import replacing

    records = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    lines = ["# Latency", "", "Written by `python benchmarks/latency.py --table`; do not edit.", ""]
    lines += sorted({line for r in records if (line := lowering(r))})
    for record in records:
        lines += ["", *table(record)]
    with replacing(target) as temporary:
        temporary.write_text("\n".join(lines) + "\n")

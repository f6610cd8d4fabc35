"""A report as Markdown, and as a table on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("stage", "top-1 %", "MACs M", "params M", "MB", "SQNR dB", "subgraphs", "in / out", "p50 ms", "speed-up")


WIDE_ONLY = "in / out"  # left out on the screen, which may be 100 columns wide


def cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of one row, in the order of COLUMNS; '' where there is no figure."""
    nodes = f"{row['delegated']} / {row['non_delegated']}" if row["delegated"] is not None else ""
    return [
        row["name"],
        _number(row["top1"], 1),
        _number(row["macs"], 1, 1e6),
        _number(row["params"], 2, 1e6),
        _number(row["bytes"], 1, 1e6),
        _number(row["sqnr_db"], 1),
        _number(row["subgraphs"], 0),
        nodes,
        _number(row["p50_ms"], 2),
        _number(row["speedup"], 2) + "x" if row["speedup"] is not None else "",
    ]


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def markdown_table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def table_block(values: Mapping[str, Any]) -> str:
    """The main table with what its figures mean underneath."""
    notes = "\n".join(f"- {n}" for n in [*legend(values), *values["notes"]])
    return f"\n{markdown_table(COLUMNS, table_rows(values))}\n\n{notes}\n"


def table_rows(values: Mapping[str, Any]) -> list[list[str]]:
    """The cells of every row; a top-1 that was taken on fewer images than the others says on how many."""
    rows, all_images = [cells(row) for row in values["rows"]], values["data"]["images"]["test"]
    for shown, row in zip(rows, values["rows"]):
        if row["images"] is not None and row["images"] != all_images:
            shown[COLUMNS.index("top-1 %")] += f" ({row['images']} images)"
    return rows


def legend(values: Mapping[str, Any]) -> list[str]:
    """What the columns mean, with sample counts."""
    images = values["data"]["images"]["test"]
    return [
        f"top-1 on {images} held-out images; MACs: multiply-accumulates of one image; MB: 10^6 bytes (eager: of the "
        "weights); SQNR: artifact, or int8 graph, against the model it was made from; subgraphs: parts of the graph that the "
        "delegate runs (in / out: nodes inside and outside it)"
    ]


def markdown(values: Mapping[str, Any]) -> str:
    """report.md."""
    verdict = "every gate met" if values["ok"] else "GATES MISSED"
    gates = [
        [g["name"], f"{g['value']:.2f} {g['unit']}", f"{'>=' if g['least'] else '<='} {g['limit']:g}", _mark(g)]
        for g in values["gates"]
    ]
    latency = [
        [r["name"], *(_number(r[k], 2) for k in ("load_ms", "first_ms", "p50_ms", "p90_ms", "p99_ms", "rss_growth_mb"))]
        for r in values["rows"]
        if r["p50_ms"] is not None
    ]
    parts = [f"# {values['model']}: {verdict}", table_block(values)]
    parts += ["## Gates", markdown_table(("gate", "value", "limit", "met"), gates)]
    if latency:
        head = ("artifact", "load ms", "first run ms", "p50 ms", "p90 ms", "p99 ms", "memory of load and first run MB")
        parts += ["## Latency", markdown_table(head, latency)]
    parts += ["## Artifacts", _artifacts(values)]
    parts += ["## Made with", f"edge_ibtm {values['edge_ibtm']}, {values['libraries']}"]
    return "\n\n".join(parts) + "\n"


def _mark(gate: Mapping[str, Any]) -> str:
    return "yes" if gate["ok"] else "NO"


def _artifacts(values: Mapping[str, Any]) -> str:
    rows = []
    for a in values["artifacts"]:
        checked = a["verify"]
        figures = [_number(checked.get(k), d) for k, d in (("cosine", 6), ("max_abs", 6), ("top1_agreement", 4))]
        rows.append([f"`{a['path']}`", *figures, f"{a['lowering_seconds']:.0f}", a["sha256"][:16]])
    return markdown_table(("file", "least cosine", "max error", "top-1 agreement", "lowered in s", "sha256"), rows)


def print_report(values: Mapping[str, Any], console: Any) -> None:
    """The table, the notes and the gates, on a rich console."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [i for i, name in enumerate(COLUMNS) if name != WIDE_ONLY]
    for i in shown:
        table.add_column(COLUMNS[i], justify="left" if i == 0 else "right", overflow="fold")
    for line in table_rows(values):
        table.add_row(*(line[i] for i in shown))
    console.print(table)
    for note in [*legend(values), *values["notes"]]:
        console.print(f"[dim]- {note}[/dim]", highlight=False)
    console.print()
    for gate in values["gates"]:
        sign, mark = (">=" if gate["least"] else "<="), "[green]met   [/]" if gate["ok"] else "[red]MISSED[/]"
        text = f"{gate['name']}: {gate['value']:.2f} {gate['unit']} ({sign} {gate['limit']:g})"
        console.print(f"{mark} {text}", highlight=False)

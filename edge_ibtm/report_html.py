"""A report as one HTML file with its plots inside (jinja2, matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from edge_ibtm.report_text import COLUMNS, cells, legend

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ v.model }}: edge_ibtm</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330 }
 table { border-collapse: collapse; margin: 1rem 0; width: 100% }
 th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #dde; white-space: nowrap }
 th:first-child, td:first-child { text-align: left }
 .ok { color: #14713d } .no { color: #b3261e; font-weight: 600 } .dim { color: #5b6472 }
 figure { display: inline-block; margin: 0 1rem 0 0 } svg { max-width: 33rem; height: auto }
</style>
<h1>{{ v.model }}</h1>
<p class="{{ 'ok' if v.ok else 'no' }}">{{ 'every gate met' if v.ok else 'gates missed' }}</p>
<table><tr>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for c in row %}<td>{{ c }}</td>{% endfor %}</tr>
{% endfor %}</table>
<ul class="dim">{% for n in notes %}<li>{{ n }}</li>{% endfor %}</ul>
{% for plot in plots %}<figure>{{ plot | safe }}</figure>{% endfor %}
<h2>Gates</h2>
<table><tr><th>gate</th><th>value</th><th>limit</th><th></th></tr>
{% for g in v.gates %}<tr><td>{{ g.name }}</td><td>{{ '%.2f' % g.value }} {{ g.unit }}</td>
<td>{{ '&ge;' | safe if g.least else '&le;' | safe }} {{ g.limit }}</td>
<td class="{{ 'ok' if g.ok else 'no' }}">{{ 'met' if g.ok else 'missed' }}</td></tr>
{% endfor %}</table>
<p class="dim">edge_ibtm {{ v.edge_ibtm }}, {{ v.libraries }}</p>
</html>
"""


def html(values: Mapping[str, Any]) -> str:
    """report.html: the table, the plots and the gates; no file beside it is needed."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(
        v=values,
        columns=COLUMNS,
        rows=[cells(r) for r in values["rows"]],
        notes=[*legend(values), *values["notes"]],
        plots=[p for p in (_accuracy_plot(values), _latency_plot(values)) if p],
    )


def _accuracy_plot(values: Mapping[str, Any]) -> str:
    rows = [r for r in values["rows"] if r["top1"] is not None]
    chance = values["chance_percent"]
    figure, axes = _figure(len(rows))
    axes.barh([r["name"] for r in rows], [r["top1"] for r in rows], color="#3b6fb6")
    axes.axvline(chance, color="#b3261e", linewidth=1, linestyle="--")
    axes.set_xlabel(f"top-1 % (dashed: chance, {chance:.1f} %)")
    return _svg(figure, axes)


def _latency_plot(values: Mapping[str, Any]) -> str:
    rows = [r for r in values["rows"] if r["p50_ms"] is not None]
    if not rows:
        return ""
    figure, axes = _figure(len(rows))
    tails = [[0] * len(rows), [max(0.0, (r["p90_ms"] or r["p50_ms"]) - r["p50_ms"]) for r in rows]]
    axes.barh([r["name"] for r in rows], [r["p50_ms"] for r in rows], xerr=tails, color="#4d9a6a", ecolor="#1c2330")
    axes.set_xlabel("latency on this host, ms (bar: p50, whisker: p90)")
    return _svg(figure, axes)


def _figure(rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 0.9 + 0.42 * rows), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any, axes: Any) -> str:
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

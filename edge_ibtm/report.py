"""What a run found, as data: rows of the table, gates, notes; and the files written from it.

`python -m edge_ibtm.report RUN --readme README.md` puts the table of RUN/report.json between the README's markers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_ibtm import __version__
from edge_ibtm.cache import Entry, library_versions
from edge_ibtm.config import Recipe
from edge_ibtm.errors import GateError, UsageError
from edge_ibtm.files import write_text
from edge_ibtm.gates import Gate, all_gates
from edge_ibtm.stages_artifact import EVALUATED

EAGER = {"base": "base", "merge": "merged, untrained", "finetune": "merged, tuned", "quantize": "merged, int8 graph"}
NEAR_DB = 25.0  # an 8-bit graph further from its model is remarked on
MARKS = ("<!-- demo-table -->", "<!-- /demo-table -->")


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a figure does not apply or was not taken.

    top1 in percent over `images` held-out images; macs of one image; bytes on disk (eager: of the weights);
    p50_ms, p90_ms on this host; speedup: base's p50 over this p50, interleaved in one run.
    """

    name: str
    top1: float | None = None
    images: int | None = None
    macs: int | None = None
    params: int | None = None
    bytes: int | None = None
    sqnr_db: float | None = None
    subgraphs: int | None = None
    delegated: int | None = None
    non_delegated: int | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    load_ms: float | None = None
    first_ms: float | None = None
    rss_growth_mb: float | None = None
    speedup: float | None = None


@dataclass
class Report:
    """Rows, gates, notes and every figure of a run, as plain values."""

    model: str
    rows: list[Row]
    gates: list[Gate]
    notes: list[str]
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every gate was met."""
        return all(g.ok for g in self.gates)

    def require(self) -> Report:
        """Itself, or GateError naming every missed gate."""
        missed = [g.text for g in self.gates if not g.ok]
        if missed:
            raise GateError(f"{len(missed)} gate{'s' if len(missed) > 1 else ''} missed: " + "; ".join(missed))
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain values for report.json."""
        gates = [{**asdict(g), "ok": g.ok} for g in self.gates]
        head = {"schema": 1, "edge_ibtm": __version__, "model": self.model, "ok": self.ok}
        return {**head, "rows": [asdict(r) for r in self.rows], "gates": gates, "notes": self.notes, **self.figures}


def build_report(recipe: Recipe, done: Mapping[str, Entry], products: list[Any], folder: Path) -> Report:
    """Collect the records of the finished stages."""
    probed = _probed(done)
    rows = [_eager_row(stage, done) for stage in EAGER if stage in done]
    rows += [_artifact_row(p, done, probed) for p in products]
    figures = {
        "run": str(folder),
        "libraries": library_versions(),
        "data": done["data"].record,
        "chance_percent": 100 / len(done["data"].record["classes"]),
        "artifacts": [_artifact_figures(p, done, folder) for p in products],
        "probe": done["probe"].record["run"] if "probe" in done else None,
        "stages": {n: e.record for n, e in done.items() if n in EAGER},
        "entries": {n: e.path.name for n, e in done.items() if n in EAGER},
        "recipe": recipe.model_dump(mode="json"),
    }
    return Report(recipe.model.name, rows, all_gates(recipe, done, products), _notes(done, products), figures)


def _eager_row(stage: str, done: Mapping[str, Entry]) -> Row:
    record = done[stage].record
    shape = done["finetune"].record if stage == "quantize" else record
    return Row(
        EAGER[stage], record["top1"], record["images"], shape["macs"], shape["params"],
        None if stage == "quantize" else record["bytes"], record.get("sqnr_db"),
    )  # fmt: skip


def _artifact_row(product: Any, done: Mapping[str, Entry], probed: Mapping[str, Any]) -> Row:
    lowered, checked = done[f"lower-{product.name}"].record, done[f"verify-{product.name}"].record
    shape = done["base" if product.stage == "base" else "finetune"].record
    values = {k: lowered[k] for k in ("bytes", "subgraphs", "delegated", "non_delegated")}
    if product.target == "coreml":  # an ML Program is whole: nothing to delegate
        values = {"bytes": lowered["bytes"]}
    values |= {k: checked.get(k) for k in ("top1", "images", "sqnr_db")}
    values |= {"macs": shape["macs"], "params": shape["params"], **probed.get(product.name, {})}
    return Row(product.file, **values)


def _probed(done: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """Latency figures by product name; speedups from the interleaved ratios against the first artifact."""
    if "probe" not in done:
        return {}
    record = done["probe"].record
    keys = ("p50_ms", "p90_ms", "p99_ms", "load_ms", "first_ms", "rss_growth_mb")
    found = {name: {k: result.get(k) for k in keys} for name, result in zip(record["names"], record["run"]["results"])}
    if record["names"][0].startswith("base."):
        for name, ratio in zip(record["names"][1:], record["run"]["ratios"]):
            found[name]["speedup"] = 1 / ratio["value"]
    return found


def _artifact_figures(product: Any, done: Mapping[str, Entry], folder: Path) -> dict[str, Any]:
    lowered = dict(done[f"lower-{product.name}"].record)
    lowered["path"] = str(folder / product.file)
    return {
        "name": product.name, "from_stage": product.stage, "precision": product.precision,
        **lowered, "verify": done[f"verify-{product.name}"].record,
    }  # fmt: skip


def _notes(done: Mapping[str, Entry], products: list[Any]) -> list[str]:
    """What a reader must know to read the figures rightly."""
    data, base = done["data"].record, done["base"].record
    images = data["images"]
    notes = [
        f"data: {data['source']}; {images['train']} training, {images['calibration']} calibration, "
        f"{images['test']} held-out images, {len(data['classes'])} classes, {data['img_size']} px",
        f"base: {base['origin']}; top-1 {base['top1']:.1f} % where chance is {100 / len(data['classes']):.1f} %",
    ]
    if "quantize" in done:
        record = done["quantize"].record
        text = f"quantized with {record.get('calibration_images')} calibration images, scheme {record.get('scheme')}"
        notes.append(f"{text}: {record['choice']}" if record.get("choice") else text)
        if record.get("sqnr_db", NEAR_DB) < NEAR_DB:
            far = f"the int8 graph is only {record['sqnr_db']:.1f} dB from its model; quantize.scheme=mixed or int8_dynamic"
            notes.append(f"{far} may be nearer")
    if "probe" in done:
        run = done["probe"].record["run"]
        notes += [_probe_note(run), *dict.fromkeys(n for result in run["results"] for n in _result_notes(result))]
    for product in products:
        checked = done[f"verify-{product.name}"].record
        if not checked["verified"]:
            notes.append(f"{product.file}: {checked['why']}")
        elif product.target in EVALUATED:
            notes.append(_coreml_note(product.file, checked))
    return notes


def _coreml_note(file: str, checked: Mapping[str, Any]) -> str:
    """On which images a package was compared: fewer than the rows above it, so its model's figure there is told too."""
    return (
        f"{file}: its ML Program was evaluated here on the first {checked['images']} held-out images only: top-1 "
        f"{checked['top1']:.1f} %, its model on the same images {checked['reference_top1']:.1f} %, the same class for "
        f"{100 * checked['top1_agreement']:.1f} % of {checked['verify_images']}; SQNR of the median image "
        f"{checked['sqnr_median_db']:.1f} dB, of the lowest {checked['sqnr_lowest_db']:.1f} dB (where half precision decides a "
        "near tie between two tokens otherwise, the image's is low); Core ML itself runs on Apple devices only, "
        "so it has no latency in this table"
    )


def _probe_note(run: Mapping[str, Any]) -> str:
    first = run["results"][0]
    device = first["device"]
    count = len(first.get("samples_ms") or ())
    return (
        f"latency: p50 of {count} warm runs each, batch 1, {first.get('threads')} threads, interleaved in one process on "
        f"{device['name']} ({device.get('cores')} cores, {device.get('runtime')}); speed-up is against the first artifact"
    )


def _result_notes(result: Mapping[str, Any]) -> list[str]:
    """What the probe remarked on one artifact."""
    unstable = ["still changing when the warm-up ended"] if result.get("stable") is False else []
    return [f"latency of {result['model']}: {n}" for n in unstable] + [f"latency: {n}" for n in result.get("notes", ())]


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html, each whole or not at all."""
    from edge_ibtm.report_html import html
    from edge_ibtm.report_text import markdown

    values = report.to_json()
    write_text(folder / "report.json", json.dumps(values, indent=1))
    write_text(folder / "report.md", markdown(values))
    write_text(folder / "report.html", html(values))


def fill_readme(run: Path, readme: Path) -> None:
    """Replace what stands between the README's markers with the table of a run.

    Errors: UsageError when the report or the markers are missing.
    """
    from edge_ibtm.report_text import table_block

    source = run / "report.json"
    if not source.is_file():
        raise UsageError(f"no {source}; run `edge-ibtm compress --out {run}` first")
    text = readme.read_text(encoding="utf-8")
    if not all(mark in text for mark in MARKS):
        raise UsageError(f"{readme} lacks the markers {MARKS[0]} and {MARKS[1]}")
    head, rest = text.split(MARKS[0], 1)
    tail = rest.split(MARKS[1], 1)[1]
    values = json.loads(source.read_text(encoding="utf-8"))
    write_text(readme, f"{head}{MARKS[0]}\n{table_block(values)}\n{MARKS[1]}{tail}")


def main() -> None:
    """Command line of `python -m edge_ibtm.report`."""
    parser = argparse.ArgumentParser(description=fill_readme.__doc__)
    parser.add_argument("run", type=Path, help="run directory with report.json")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    given = parser.parse_args()
    fill_readme(given.run, given.readme)


if __name__ == "__main__":
    main()

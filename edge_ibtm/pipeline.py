"""compress: check -> data -> base -> merge -> finetune -> quantize -> lower -> verify -> probe -> report.

Every stage is looked up in the run's cache first and only runs when something it depends on changed (cache.py). A second
identical run touches neither torch nor the images.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from edge_ibtm.cache import Cache, Entry, Stage, locked, partial_of, weights_hash
from edge_ibtm.config import Recipe
from edge_ibtm.files import refuse_file
from edge_ibtm.lowering import Workers, parallel_jobs
from edge_ibtm.report import Report, build_report, write_report
from edge_ibtm.stages_names import SOURCES
from edge_ibtm.watch import Watch

Work = Callable[[Path], dict[str, Any]]


def compress(recipe: Recipe, out: str | Path | None = None, *, watch: Watch | None = None) -> Report:
    """Carry out a recipe in the run directory `out` (default runs/<model>) and return its report.

    Artifacts, report.json, report.md and report.html are in `out`; stage results under `out/stages` are reused by the
    next run. The report names missed gates; it does not raise for them (`Report.require`).
    Errors: UsageError for requests that cannot be carried out, EdgeIBTMError when a stage fails.
    """
    folder = Path(out) if out is not None else Path("runs") / recipe.model.name
    refuse_file(folder)
    begun = time.monotonic()
    run = Run(recipe, folder, watch or Watch())
    run.check()
    with locked(folder):
        run.models()
        run.artifacts()
        run.judge()
        report = build_report(recipe, run.context.done, run.products, folder)
        report.figures["seconds"] = time.monotonic() - begun
        publish(folder, run.products, run.context.done)
        write_report(report, folder)
    return report


class Run:
    """One pass through the stages. `context.done` collects the entries."""

    def __init__(self, recipe: Recipe, folder: Path, watch: Watch) -> None:
        from edge_ibtm.stages import Context

        self.recipe, self.watch, self.cache = recipe, watch, Cache(folder)
        self.context = Context(recipe, watch)
        self.products: list[Any] = []
        self.on: dict[str, Any] | None = None  # the device that probes; None: nothing will be probed

    # --- one stage ------------------------------------------------------------------------------------------------

    def stage(self, name: str, inputs: dict[str, Any], work: Work, kind: str | None = None) -> Entry:
        """The entry of a stage, from the cache or by running it; announced either way."""
        stage = Stage(name, inputs, SOURCES[kind or name])
        entry = self.cache.find(stage)
        if entry is not None:
            self.watch.skipped(name, "cached, nothing it depends on changed")
        else:
            self.watch.started(name, self.cache.why_not(stage))
            start = time.monotonic()
            with self._announce_failure(name):
                entry = self.cache.make(stage, work)
            self.watch.finished(name, time.monotonic() - start, _headline(entry.record))
        self.context.done[name] = entry
        return entry

    @contextmanager
    def _announce_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.watch.failed(name)
            raise

    def digest(self, *names: str) -> dict[str, str]:
        """Content of the entries a stage reads."""
        return {n: self.context.done[n].digest for n in names}

    # --- the stages in order --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what cannot work before anything is made: on every run, for a phone may be gone."""
        from edge_ibtm.stages import preflight
        from edge_ibtm.stages_artifact import products

        recipe = self.recipe
        inputs = {
            "model": recipe.model.model_dump(),
            "weights": weights_hash(self.recipe.model.weights),
            "merge": recipe.merge.model_dump(),
            "targets": recipe.lower.targets,
            "device": recipe.probe.device,
        }
        stage = Stage("check", inputs, SOURCES["check"])
        entry = self.cache.find(stage)
        if entry is None:
            self.watch.started("check", self.cache.why_not(stage))
            with self._announce_failure("check"):
                record = preflight(recipe)
                entry = self.cache.make(stage, lambda folder: record)
            self.watch.finished("check", 0.0)
        self.context.done["check"] = entry
        self.products = products(recipe, entry.record["suffixes"])
        if any(p.suffix == ".pte" for p in self.products):
            self.on = device_facts(recipe.probe.device)

    def models(self) -> None:
        """data, base, merge, finetune, quantize."""
        from edge_ibtm import stages
        recipe, context = self.recipe, self.context
        view = {"model": recipe.model.name, "img_size": recipe.model.img_size, "classes": recipe.model.num_classes}
        data_inputs = {**recipe.data.model_dump(), **view, "seed": recipe.seed, "files": context.files}
        self.stage("data", data_inputs, lambda f: stages.make_data(context, f))
        trained = recipe.model.weights is None or recipe.model.new_head
        base_inputs = {
            "model": recipe.model.model_dump(),
            "weights": weights_hash(self.recipe.model.weights),
            "train": recipe.base.model_dump() if trained else None,
            "seed": recipe.seed,
            **self.digest("data"),
        }
        self.stage("base", base_inputs, lambda f: stages.make_base(context, f))
        merge_inputs = {**recipe.merge.model_dump(), "seed": recipe.seed, **self.digest("data", "base")}
        self.stage("merge", merge_inputs, lambda f: stages.make_merge(context, f))
        tune = recipe.finetune.model_dump()
        reads = ("data", "merge", "base") if recipe.finetune.distill else ("data", "merge")
        tune_inputs = {**tune, "seed": recipe.seed, **self.digest(*reads)}
        self.stage("finetune", tune_inputs, lambda f: stages.make_finetune(context, f))
        if any(p.stage == "quantize" for p in self.products):
            quantize_inputs: dict[str, Any] = {"scheme": recipe.quantize.scheme, **self.digest("data", "finetune")}
            if recipe.quantize.scheme == "qat":
                quantize_inputs |= {"qat": recipe.quantize.model_dump(), "train": tune, "seed": recipe.seed}
            self.stage("quantize", quantize_inputs, lambda f: stages.make_quantize(context, f))
        else:
            self.watch.skipped("quantize", "no int8 artifact was asked for")

    def artifacts(self) -> None:
        """Every artifact a cache entry of its own; missing ones are lowered in parallel worker processes."""
        from edge_ibtm.stages_artifact import make_lower

        workers = Workers(set())

        def _lower(product: Any, folder: Path) -> dict[str, Any]:
            return make_lower(self.context, product, folder, workers)

        missing = [p for p in self.products if self.cache.find(self._lower_stage(p)) is None]
        count = parallel_jobs(self.recipe.lower.jobs, len(missing))
        if len(missing) > 1:
            self.watch.note(f"{len(missing)} artifacts to lower, {count} at a time (cores and free memory)")
        pool = ThreadPoolExecutor(count)
        try:
            futures = [
                pool.submit(self.stage, f"lower-{p.name}", self._lower_inputs(p), partial(_lower, p), "lower")
                for p in self.products
            ]
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            workers.stop()
            raise
        finally:
            pool.shutdown(wait=True)

    def judge(self) -> None:
        """verify each artifact, then probe all of them together."""
        from edge_ibtm.stages_artifact import EVALUATED, make_probe, make_verify

        context = self.context
        for product in self.products:
            inputs = {"images": self.recipe.verify.images, **self.digest(f"lower-{product.name}", product.stage, "data")}
            self.stage(f"verify-{product.name}", inputs, partial(make_verify, context, product), "verify")
        verified = [p for p in self.products if context.done[f"verify-{p.name}"].record["verified"]]
        found = [p for p in verified if p.suffix == ".pte" and p.target not in EVALUATED]
        if not found:
            self.watch.skipped("probe", "no artifact that this host can run")
            return
        names = [f"lower-{p.name}" for p in found]
        section = self.recipe.probe
        inputs = {**section.model_dump(), "on": self.on, "order": names, **self.digest(*names)}
        self.stage("probe", inputs, lambda f: make_probe(context, found, f))

    # --- keys -----------------------------------------------------------------------------------------------------

    def _lower_inputs(self, product: Any) -> dict[str, Any]:
        reads = ("data", product.stage) if product.target == "coreml" else (product.stage,)
        return {"target": product.target, "precision": product.precision, **self.digest(*reads)}

    def _lower_stage(self, product: Any) -> Stage:
        return Stage(f"lower-{product.name}", self._lower_inputs(product), SOURCES["lower"])


def device_facts(device: str) -> dict[str, Any]:
    """What decides latency on a device: which phone, or this host's CPU, cores and operating system."""
    import platform

    from edge_ibtm.probe.facts import cpu_model, usable_cores

    kind, _, serial = device.partition(":")
    if kind == "android":
        from edge_ibtm.probe.adb import choose_device

        return {"phone": choose_device(serial or None).serial}
    return {"cpu": cpu_model(), "cores": usable_cores(), "system": platform.platform()}


def publish(folder: Path, products: list[Any], done: dict[str, Entry]) -> None:
    """Put the artifacts into the run directory under their plain names, whole or absent, in place of the last report's."""
    for name in published(folder) - {product.file for product in products}:
        _remove(folder / name)
    for product in products:
        source = done[f"lower-{product.name}"].file(product.file)
        final = folder / product.file
        part = partial_of(final)
        _remove(part)
        if source.is_dir():
            shutil.copytree(source, part)
            _remove(final)
        else:
            shutil.copyfile(source, part)
        part.replace(final)


def published(folder: Path) -> set[str]:
    """Names of the artifacts that the report in a run directory tells of."""
    try:
        told = json.loads((folder / "report.json").read_text(encoding="utf-8"))["artifacts"]
        return {name for each in told if (name := Path(each["path"]).name).startswith(("base.", "merged."))}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _headline(record: dict[str, Any]) -> str:
    """The figures of a record worth a line on the screen."""
    parts = []
    if "top1" in record:
        parts.append(f"top-1 {record['top1']:.1f} % of {record['images']} held-out images")
    if "sqnr_db" in record:
        parts.append(f"SQNR {record['sqnr_db']:.1f} dB")
    if "subgraphs" in record:
        parts.append(f"{record['bytes'] / 1e6:.1f} MB, {record['subgraphs']} subgraphs")
    return ", ".join(parts)

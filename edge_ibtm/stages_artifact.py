"""The stages that make and judge artifacts: lower, verify, probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_ibtm.config import Recipe
from edge_ibtm.errors import CannotRunHere
from edge_ibtm.files import save_tensors
from edge_ibtm.lowering import LowerJob, Workers, run_job
from edge_ibtm.stages import CONVERTED, WEIGHTS, Context, count_correct, load_converted, stacked

EVALUATED = ("coreml", "coreml_pte")  # on a Mac Core ML runs them, elsewhere its operations are evaluated one by one


@dataclass(frozen=True)
class Product:
    """One artifact of a run: the stage whose model it holds, its target, its precision and its file name."""

    name: str
    stage: str
    target: str
    precision: str
    suffix: str

    @property
    def file(self) -> str:
        """File name of the artifact."""
        return f"{self.name}{self.suffix}"


def products(recipe: Recipe, suffixes: Mapping[str, str]) -> list[Product]:
    """The artifacts a recipe asks for, the base first: it is what the others are compared with.

    suffixes: target -> file suffix.

    Every target gets fp32 (Core ML: its own precision, in a `.pte` fp16); targets that run PT2E graphs get int8 too.
    """
    made = []
    for target in recipe.lower.targets:
        precision = {"coreml": recipe.lower.coreml_precision, "coreml_pte": "fp16"}.get(target, "fp32")
        origins = (["base"] if recipe.lower.base and target not in EVALUATED else []) + ["finetune"]
        for stage in origins:
            made.append(_product(stage, target, precision, suffixes[target]))
        if recipe.quantize.scheme != "none" and target in ("xnnpack", "portable"):
            made.append(_product("quantize", target, "int8", suffixes[target]))
    return made


def _product(stage: str, target: str, precision: str, suffix: str) -> Product:
    kind = "base" if stage == "base" else "merged"
    return Product(f"{kind}.{target}.{precision}", stage, target, precision, suffix)


def make_lower(context: Context, product: Product, folder: Path, workers: Workers) -> dict[str, Any]:
    """Write one artifact in a process of its own; the record says what is in it."""
    entry = context.done[product.stage]
    source = entry.file(CONVERTED if product.stage == "quantize" else WEIGHTS)
    spec = context.spec("finetune" if product.stage == "quantize" else product.stage)
    job = LowerJob(
        str(source), str(folder / product.file), product.target, spec.to_json(), _options(context, product, folder)
    )
    return run_job(job, workers)


def _options(context: Context, product: Product, folder: Path) -> dict[str, Any]:
    if product.target != "coreml":
        return {}
    data, merge = context.done["data"].record, context.recipe.merge
    share = f"keep ratio {merge.keep_ratio}" if merge.macs is None else f"{merge.macs} of the base's MACs"
    described = f"{context.recipe.model.name}, tokens merged by {merge.merger} at {share}"
    calibration = {"calibration": _calibration_file(context, folder)} if product.precision == "w8a8" else {}
    return {
        **calibration,
        "precision": product.precision,
        "class_names": data["classes"],
        "mean": data["mean"],
        "std": data["std"],
        "metadata": {"author": "edge_ibtm", "description": described, "version": "1"},
    }


def _calibration_file(context: Context, folder: Path) -> str:
    """The calibration images in a file that the worker reads; it goes when the stage is complete."""
    file = folder / "scratch" / "calibration.pt"
    file.parent.mkdir(exist_ok=True)
    save_tensors(stacked(context.data.calibration), file)
    return str(file)


def make_verify(context: Context, product: Product, folder: Path) -> dict[str, Any]:
    """Run the artifact on held-out images against the model it came from: SQNR, agreement and its own top-1."""
    from edge_ibtm.targets import TARGETS

    path = context.done[f"lower-{product.name}"].file(product.file)
    structure = _structure(product, path)
    if product.target not in EVALUATED and not TARGETS[product.target].loads_here:
        why = f"this host has no runtime for {product.target}; run it on a device"
        return {"verified": False, "why": why}
    try:
        return {**_compare(context, product, path), **structure}
    except CannotRunHere as err:
        return {"verified": False, "why": f"its structure was checked, but it cannot be run here: {err}", **structure}


def _compare(context: Context, product: Product, path: Path) -> dict[str, Any]:
    import torch

    from edge_ibtm.verify import runner_of, verify

    data = context.data
    images = list(stacked(data.test, context.recipe.verify.images).split(1))
    count = len(images)
    if product.stage == "quantize":
        reference = load_converted(context.done["quantize"].file(CONVERTED))
    else:
        reference = context.model(product.stage)
    verdict = verify(reference, path, images)
    run = runner_of(path)
    limit = count if product.target in EVALUATED else None

    def predict(batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([run(image[None]) for image in batch])

    correct, seen = count_correct(
        predict, data, limit=limit, report=context.reporter(f"verify-{product.name}")
    )
    before = None if limit is None else _reference_top1(reference, data, limit)
    figures = {k: v for k, v in asdict(verdict).items() if k not in ("ok", "failures")}
    return {
        "verified": True,
        **figures,
        "verify_images": count,
        "top1": 100 * correct / seen,
        "images": seen,
        "reference_top1": before,
    }


def _reference_top1(reference: Any, data: Any, limit: int) -> float:
    """The model's own top-1 where only the first `limit` images are compared."""
    correct, seen = count_correct(reference, data, limit=limit)
    return 100 * correct / seen


def _structure(product: Product, path: Path) -> dict[str, Any]:
    """What a Core ML package says about itself (inputs, outputs, weights); nothing for other targets."""
    if product.target != "coreml":
        return {}
    from edge_ibtm.targets.coreml import package_facts

    facts = asdict(package_facts(path))
    facts.pop("path")
    return {"package": facts}


def make_probe(context: Context, found: list[Product], folder: Path) -> dict[str, Any]:
    """Latency of every artifact this host can run, interleaved in one run; ratios are against the first."""
    import torch

    from edge_ibtm.probe import probe_many

    size = context.spec("base").img_size
    example = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    section = context.recipe.probe
    paths = [context.done[f"lower-{p.name}"].file(p.file) for p in found]
    run = probe_many(paths, example, threads=section.threads, device=section.device)
    return {"names": [p.name for p in found], "run": run.model_dump(mode="json")}

"""Gates of a run: how far artifacts may be from their models, how much top-1 a stage may lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_ibtm.cache import Entry
from edge_ibtm.config import Recipe, VerifySection

# Figures of a verdict that gates judge: what they are called, their unit, and what they are multiplied with for it.
FIGURES = {
    "sqnr_db": ("SQNR", "dB", 1),
    "sqnr_median_db": ("SQNR of the median image", "dB", 1),
    "top1_agreement": ("same class as its model", "%", 100),
}


@dataclass(frozen=True)
class Gate:
    """One requirement: value against limit in `unit`; `least`: the limit is a minimum, else a maximum."""

    name: str
    value: float
    limit: float
    unit: str
    least: bool

    @property
    def ok(self) -> bool:
        """Whether the requirement is met; NaN never is."""
        return self.value >= self.limit if self.least else self.value <= self.limit

    @property
    def text(self) -> str:
        """`name: value unit (at least limit)`."""
        return f"{self.name}: {self.value:.2f} {self.unit} (at {'least' if self.least else 'most'} {self.limit:g})"


def all_gates(recipe: Recipe, done: Mapping[str, Entry], products: list[Any]) -> list[Gate]:
    """Every gate of a run, met or not, in the order of the stages."""
    gates = [_drop(recipe, "fine-tuned against base", done["base"].record["top1"], done["finetune"].record["top1"])]
    if "quantize" in done:
        before, after = done["finetune"].record["top1"], done["quantize"].record["top1"]
        gates.append(_drop(recipe, "int8 graph against fine-tuned", before, after))
    for product in products:
        checked = done[f"verify-{product.name}"].record
        if checked["verified"]:
            gates += _artifact_gates(recipe, product, checked, done[product.stage].record)
    return gates + _device_gates(done)


def _device_gates(done: Mapping[str, Entry]) -> list[Gate]:
    """Where artifacts were probed on another device than this: whether its outputs are right."""
    results = done["probe"].record["run"]["results"] if "probe" in done else []
    return [
        Gate(f"{result['model']} on {result['device']['name']}: outputs right", float(result["parity"]["ok"]), 1, "", True)
        for result in results
        if result.get("parity") is not None
    ]


def _artifact_gates(recipe: Recipe, product: Any, checked: Mapping[str, Any], source: Mapping[str, Any]) -> list[Gate]:
    gates = []
    for figure, limit in limits_of(recipe.verify, product.precision).items():
        what, unit, scale = FIGURES[figure]
        if limit is not None:
            gates.append(Gate(f"{product.file} {what}", scale * checked[figure], scale * limit, unit, True))
    before = checked["reference_top1"] if checked.get("reference_top1") is not None else source["top1"]
    gates.append(_drop(recipe, f"{product.file} against its model", before, checked["top1"]))
    return gates


def limits_of(section: VerifySection, precision: str) -> dict[str, float | None]:
    """What `edge_ibtm.verify.Limits` holds for a precision; nothing for palettes, whose error the top-1 gate judges.

    Core ML packages round features otherwise than eager, and so decide a near tie between two tokens otherwise in an image
    here and there: their SQNR is that of the median image, and the classes have to agree beside it.
    """
    if precision in ("fp32", "int8"):
        return {"sqnr_db": section.fp32_sqnr_db if precision == "fp32" else section.int8_sqnr_db}
    if precision in ("fp16", "int8w"):
        median = section.fp16_sqnr_db if precision == "fp16" else section.int8_sqnr_db
        return {"sqnr_db": None, "sqnr_median_db": median, "top1_agreement": section.agreement}
    return {"sqnr_db": None}


def _drop(recipe: Recipe, name: str, before: float, after: float) -> Gate:
    return Gate(f"top-1 loss, {name}", before - after, recipe.verify.max_drop, "points", False)

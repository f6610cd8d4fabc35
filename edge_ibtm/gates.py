"""Gates of a run: how far artifacts may be from their models, how much top-1 a stage may lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_ibtm.cache import Entry
from edge_ibtm.config import Recipe, VerifySection


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
    return gates


def _artifact_gates(recipe: Recipe, product: Any, checked: Mapping[str, Any], source: Mapping[str, Any]) -> list[Gate]:
    limit = sqnr_limit(recipe.verify, product.precision)
    gates = []
    if limit is not None:
        gates.append(Gate(f"{product.file} SQNR", checked["sqnr_db"], limit, "dB", True))
    before = checked["reference_top1"] if checked.get("reference_top1") is not None else source["top1"]
    gates.append(_drop(recipe, f"{product.file} against its model", before, checked["top1"]))
    return gates


def sqnr_limit(section: VerifySection, precision: str) -> float | None:
    """The least SQNR of a precision in dB; None for palettes, whose error the top-1 gate judges."""
    limits = {
        "fp32": section.fp32_sqnr_db,
        "fp16": section.fp16_sqnr_db,
        "int8": section.int8_sqnr_db,
        "int8w": section.int8_sqnr_db,
    }
    return limits.get(precision)


def _drop(recipe: Recipe, name: str, before: float, after: float) -> Gate:
    return Gate(f"top-1 loss, {name}", before - after, recipe.verify.max_drop, "points", False)

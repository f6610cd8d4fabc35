"""What an artifact in a run directory of `compress` came from: its model, and held-out images to compare them on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.errors import UsageError
from edge_ibtm.files import sha256_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edge_ibtm.verify import Limits


@dataclass(frozen=True)
class Origin:
    """The model of an artifact, normalised held-out images [n, 3, H, W], and what the run's gates ask of it."""

    reference: nn.Module
    images: torch.Tensor
    stage: str
    limits: Limits


def origin_of(artifact: Path, count: int | None = None) -> Origin:
    """Find the origin of `artifact` through the report.json beside it. count: images, None takes the recipe's number.

    Errors: UsageError when the artifact is not in a run directory, is not the one of its report, or its model is gone.
    """
    if count is not None and count < 1:
        raise UsageError(f"images is {count}; give at least 1 held-out image, or leave it out for the recipe's number")
    report_file = _report_file(artifact)
    if not report_file.is_file():
        raise UsageError(
            f"nothing says which model {artifact} came from: give --model (and --weights, --keep-ratio), or verify it in "
            "the run directory of `edge-ibtm compress`"
        )
    report = json.loads(report_file.read_text(encoding="utf-8"))
    row = _row(artifact, report)
    if row is None:
        raise UsageError(f"{report_file} knows no {artifact.name}; give --model")
    if sha256_of(artifact) != row["sha256"]:
        raise UsageError(f"{artifact} has changed since {report_file} was written; run compress again, or give --model")
    stage = row["from_stage"]
    return _origin(artifact.parent, stage, row["precision"], report, count)


def reported(artifact: Path) -> bool:
    """Whether a report.json beside `artifact` names it."""
    file = _report_file(artifact)
    return file.is_file() and _row(artifact, json.loads(file.read_text(encoding="utf-8"))) is not None


def _report_file(artifact: Path) -> Path:
    return artifact.parent / "report.json"


def _row(artifact: Path, report: dict[str, Any]) -> dict[str, Any] | None:
    return next((a for a in report["artifacts"] if Path(a["path"]).name == artifact.name), None)


def _origin(run: Path, stage: str, precision: str, report: dict[str, Any], count: int | None) -> Origin:
    import torch

    from edge_ibtm.checkpoint import ModelSpec, build
    from edge_ibtm.config import Recipe
    from edge_ibtm.data import load_data, view_of
    from edge_ibtm.gates import limits_of
    from edge_ibtm.stages import CONVERTED, WEIGHTS, load_converted
    from edge_ibtm.verify import Limits

    recipe, record = Recipe.model_validate(report["recipe"]), report["stages"][stage]
    entry = _entry_folder(run, stage, report)
    if stage == "quantize":
        reference = load_converted(entry / CONVERTED)
    else:
        reference = build(ModelSpec.from_json(record["spec"]), entry / WEIGHTS)
    data = load_data(recipe.data, view_of(recipe.model.name, recipe.model.img_size), seed=recipe.seed)
    number = min(count or recipe.verify.images, len(data.test))
    images = torch.stack([data.test[i][0] for i in range(number)])
    return Origin(reference, images, stage, Limits(**limits_of(recipe.verify, precision)))


def _entry_folder(run: Path, stage: str, report: dict[str, Any]) -> Path:
    """The finished stage that the report names."""
    folder = run / "stages" / report.get("entries", {}).get(stage, "")
    entry = folder / "entry.json"
    if entry.is_file() and json.loads(entry.read_text(encoding="utf-8"))["record"] == report["stages"][stage]:
        return folder
    raise UsageError(
        f"the model of stage {stage} is no longer under {run / 'stages'}; run compress again, or give --model"
    )

"""Core ML: an eager model becomes a `.mlpackage` that an app can drop in, and can be run again without a Mac.

The package takes an RGB image of bytes (the model's own normalisation is inside the graph, per channel), returns the
logits, and with class names also Vision's `classLabel` and `classLabel_probs`. Conversion works on every system;
Core ML itself exists on macOS only, so elsewhere `run_mlpackage` evaluates the ML Program (edge_ibtm.targets.mil_eval).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.errors import EdgeIBTMError, UsageError, lookup
from edge_ibtm.targets.common import check_example, first_line, is_captured
from edge_ibtm.targets.coreml_classify import LOGITS
from edge_ibtm.targets.coreml_compress import compress
from edge_ibtm.targets.coreml_package import (
    IMAGE,
    TENSOR,
    PackageText,
    artifact_of,
    package_facts,
    refuse_foreign,
    run_mlpackage,
    save_package,
    to_bytes,
)
from edge_ibtm.targets.coreml_precision import compute_precision
from edge_ibtm.targets.coreml_tools import quiet_coremltools

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edge_ibtm.targets import Artifact

__all__ = ["PRECISIONS", "CoreMLOptions", "lower_coreml", "package_facts", "run_mlpackage"]
DEPLOYMENT_TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18", "iOS26")


@dataclass(frozen=True)
class Precision:
    """How numbers are stored and computed, and the oldest system whose Core ML can read it."""

    name: str
    compute: str
    deployment: str
    summary: str


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp16", "fp16", "iOS15", "half precision throughout; merge decisions stay in fp32"),
        Precision("fp32", "fp32", "iOS15", "single precision: CPU and GPU only, for reference"),
        Precision("int8w", "fp16", "iOS16", "int8 weights per output channel, computed in half precision"),
        Precision("w8a8", "fp16", "iOS17", "int8 weights and calibrated int8 activations"),
        Precision("pal4", "fp16", "iOS16", "16-entry palette per weight"),
        Precision("pal6", "fp16", "iOS16", "64-entry palette per weight"),
    )
}


@dataclass(frozen=True)
class CoreMLOptions:
    """What the package should be.

    precision: one of PRECISIONS. class_names: labels of the logits' last axis; None gives no classifier. mean, std: the
    model's normalisation of RGB in 0..1, three numbers each; None takes timm's `pretrained_cfg`, and a model that has
    none gets a plain float tensor input, already normalised. deployment: oldest system to support. metadata: author,
    license, description, version, and any further name -> text. calibration: normalised images [n, 3, H, W] for w8a8.
    """

    precision: str = "fp16"
    class_names: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    deployment: str = "iOS17"
    metadata: Mapping[str, str] = field(default_factory=dict)
    calibration: Any = None


def lower_coreml(
    model: nn.Module, example: torch.Tensor, path: str | Path, options: CoreMLOptions | None = None
) -> Artifact:
    """Convert `model` (images [B, 3, H, W] -> logits [B, classes]) to a `.mlpackage` at `path`.

    The shape of `example` [1, 3, H, W] becomes the fixed input shape. The package is complete or absent: it is written
    next to `path` and renamed. Raises UsageError for a bad request and EdgeIBTMError when coremltools cannot convert.
    """
    options = options or CoreMLOptions()
    path = Path(path)
    (example,) = check_example(example)
    precision = _check(options, example, path)
    normalised = _normalisation(model, options)
    mlmodel = _convert(_with_normalisation(model, normalised), example, precision, options, normalised is not None)
    mlmodel = compress(mlmodel, precision.name, _calibration(options, normalised))
    save_package(mlmodel, path, _described(options, normalised))
    return artifact_of(path)


def _check(options: CoreMLOptions, example: torch.Tensor, path: Path) -> Precision:
    precision = lookup("Core ML precision", options.precision, PRECISIONS)
    lookup("Core ML deployment target", options.deployment, {t: t for t in DEPLOYMENT_TARGETS})
    if DEPLOYMENT_TARGETS.index(options.deployment) < DEPLOYMENT_TARGETS.index(precision.deployment):
        raise UsageError(
            f"precision {precision.name!r} needs deployment target {precision.deployment} or newer, "
            f"got {options.deployment!r}: raise the target or choose another precision"
        )
    if path.suffix != ".mlpackage":
        raise UsageError(f"a Core ML package ends in .mlpackage, got {str(path)!r}")
    refuse_foreign(path)
    if example.dim() != 4 or example.shape[:2] != (1, 3):
        raise UsageError(f"Core ML example must be one image [1, 3, H, W], got {tuple(example.shape)}")
    if (options.mean is None) != (options.std is None):
        raise UsageError("mean and std go together: give both or neither")
    for name in ("mean", "std"):
        values = getattr(options, name)
        if values is not None and len(values) != 3:
            raise UsageError(f"{name} needs three numbers (R, G, B), got {list(values)}")
    return precision


def _normalisation(model: nn.Module, options: CoreMLOptions) -> tuple[list[float], list[float]] | None:
    """(mean, std) of RGB in 0..1, or None when the model does not say."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean = options.mean if options.mean is not None else cfg.get("mean")
    std = options.std if options.std is not None else cfg.get("std")
    if mean is None or std is None:
        return None
    return [float(v) for v in mean], [float(v) for v in std]


def _calibration(options: CoreMLOptions, normalised: tuple[list[float], list[float]] | None) -> Any:
    """Calibration images as the program's input receives them: bytes when the normalisation is inside."""
    images = options.calibration
    if images is None or normalised is None or not images.is_floating_point():
        return None if images is None else images.float()
    return to_bytes(images, *normalised)


def _with_normalisation(model: nn.Module, normalised: tuple[list[float], list[float]] | None) -> nn.Module:
    """A copy of the model, lowered-friendly, that takes bytes 0..255 when the normalisation is known."""
    import torch
    from torch import nn

    class BytesIn(nn.Module):
        scale: torch.Tensor
        bias: torch.Tensor

        def __init__(self, body: nn.Module, mean: list[float], std: list[float]) -> None:
            super().__init__()
            self.body = body
            scale = 1 / (255 * torch.tensor(std).view(1, 3, 1, 1))
            self.register_buffer("scale", scale)
            self.register_buffer("bias", -(torch.tensor(mean) / torch.tensor(std)).view(1, 3, 1, 1))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.body(image * self.scale + self.bias)

    body = inference_copy(model)
    return body if normalised is None else BytesIn(body, *normalised)


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode; a graph module has no modes."""
    copy = deepcopy(model)
    return copy if is_captured(model) else copy.eval()


def _convert(model: nn.Module, example: torch.Tensor, precision: Precision, options: CoreMLOptions, image: bool) -> Any:
    """torch.export, then coremltools; returns an unsaved MLModel whose one output is the logits in fp32."""
    import numpy as np
    import torch

    with quiet_coremltools() as ct, torch.no_grad():
        logits = model(example)
        _check_classes(logits, options.class_names)
        if image:
            source = ct.ImageType(IMAGE, shape=tuple(example.shape), color_layout=ct.colorlayout.RGB)
        else:
            source = ct.TensorType(TENSOR, shape=tuple(example.shape), dtype=np.float32)
        try:
            exported = exported_for_coreml(model, example)
            return ct.convert(
                exported,
                inputs=[source],
                outputs=[ct.TensorType(LOGITS, dtype=np.float32)],
                compute_precision=compute_precision(precision.compute),
                minimum_deployment_target=getattr(ct.target, options.deployment),
                skip_model_load=True,
                convert_to="mlprogram",
            )
        except Exception as error:
            raise EdgeIBTMError(
                f"coremltools could not convert the model: {first_line(error)}; replace that operation in the model, "
                "or lower to another target"
            ) from error


def exported_for_coreml(model: nn.Module, example: torch.Tensor) -> Any:
    """torch.export in core ATen, without the views of constants that coremltools has no translation for."""
    import torch

    exported = torch.export.export(model, (example,)).run_decompositions({})
    aten = torch.ops.aten
    same = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
    for node in list(exported.graph.nodes):
        if node.target in same:
            node.replace_all_uses_with(node.args[0])
            exported.graph.erase_node(node)
    exported.graph_module.recompile()
    return exported


def _check_classes(logits: Any, names: Sequence[str] | None) -> None:
    import torch

    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UsageError(f"Core ML lowering wants a classifier that returns logits [1, classes], got {got}")
    if names is not None and len(names) != logits.shape[1]:
        raise UsageError(f"{len(names)} class names for {logits.shape[1]} logits: the two must match")


def _described(options: CoreMLOptions, normalised: tuple[list[float], list[float]] | None) -> PackageText:
    notes = {"precision": options.precision, **{k: str(v) for k, v in options.metadata.items()}}
    if normalised is not None:
        notes["mean"], notes["std"] = (",".join(repr(v) for v in values) for values in normalised)
    return PackageText(notes, list(options.class_names) if options.class_names is not None else None)

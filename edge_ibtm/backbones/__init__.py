"""Backbones: one file a family of timm models. A registry line adds one; the contract test then covers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import EdgeIBTMError, UsageError, check_count, suggest
from .common import Family, Settings
from .efficientvit import EFFICIENTVIT
from .mobilevit import MOBILEVIT
from .swin import SWIN
from .vit import VIT

BACKBONES: dict[str, Family] = {f.name: f for f in (MOBILEVIT, EFFICIENTVIT, VIT, SWIN)}

__all__ = ["BACKBONES", "Family", "Settings", "build_model", "check_name", "family_of", "model_names"]


def model_names() -> list[str]:
    """Names of the timm models that are supported and tested."""
    return [name for family in BACKBONES.values() for name in family.models]


def family_of(model: nn.Module) -> Family:
    """The family of a model, merged or not. Raises UsageError when no family handles it."""
    for family in BACKBONES.values():
        if family.handles(model) or _is_merged(model, family):
            return family
    raise UsageError(
        f"{type(model).__name__} has no tokens that can be merged; supported families: {', '.join(BACKBONES)} "
        "(timm's MobileViT, EfficientViT (MIT), ViT/DeiT/DINOv2 and Swin)"
    )


def _is_merged(model: nn.Module, family: Family) -> bool:
    home = f"{__name__}.{family.name}"
    return any(type(m).__module__ == home for m in model.modules())


def check_name(name: str) -> None:
    """UsageError unless timm knows a model of this name."""
    import timm

    if not isinstance(name, str) or not timm.is_model(name):
        raise UsageError(f"unknown model {name!r}; {suggest(str(name).split('.')[0], model_names())}")


def build_model(
    name: str, *, num_classes: int = 1000, weights: str | Path | None = None, img_size: int | None = None
) -> nn.Module:
    """A timm model of a supported family, in eval mode.

    name: a timm name, with or without a tag (`mobilevit_s`, `vit_small_patch16_224.augreg_in1k`). weights: None (random),
    "pretrained" (timm's hub), or a file (safetensors, or .pth read with weights_only). img_size: pixels, for models with
    position embeddings or windows of fixed size (ViT, Swin). Raises UsageError for what cannot be built as asked.
    """
    check_count("num_classes", num_classes)
    if img_size is not None:
        check_count("img_size", img_size)
    check_name(name)
    import timm

    options: dict[str, Any] = {"num_classes": num_classes}
    if img_size is not None and name.startswith(("vit", "deit", "swin")):
        options["img_size"] = img_size
    try:
        model = timm.create_model(name, pretrained=weights == "pretrained", **options)
    except (OSError, RuntimeError, ValueError) as error:
        if weights != "pretrained":
            raise UsageError(f"cannot build {name!r} with {options}: {error}") from error
        raise EdgeIBTMError(
            f"cannot fetch pretrained weights of {name!r} ({_line(error)}); connect to the model hub, or give a "
            "local file (--weights FILE, in a recipe model.weights), or none, to train a base model"
        ) from error
    family_of(model)
    if weights is not None and weights != "pretrained":
        from ..checkpoint import load_into, read_state

        load_into(model, read_state(weights), str(weights))
    return model.eval()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Density "once": the map stays merged through all later stages; features on demand are restored to the original grid.

timm takes features by iterating over a model's stages (forward_intermediates) or over a FeatureListNet (features_only).
Iterating over what is put in their place gives callables that pass the merged map on among themselves and return the
restored one; calling runs the merged map through, and costs nothing more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models import FeatureListNet
from torch import Tensor, nn

from ..plan import GridPlan
from ..site import Merged
from .common import captured, handing_on, replace_modules


def restore_map(x: Tensor, merged: Merged, patch: tuple[int, int], reduction: int) -> Tensor:
    """A merged map [B, C, h', w'] of the site's stage or a later one on the grid it would have had: [B, C, h, w].

    merged: what the site did, to patches of patch = (height, width) pixels. reduction: how much coarser x is than the
    map at the site. x is copied up to the site's resolution, every merged patch back to the places it came from, and
    averaged over the places that one pixel of x stands for.
    """
    assert isinstance(merged.plan, GridPlan) and merged.grid is not None
    (ph, pw), (height, width), full = patch, merged.grid, merged.plan.grid
    x = F.interpolate(x, size=(height * ph, width * pw), mode="nearest")
    batch, channels = x.shape[:2]
    tokens = x.reshape(batch, channels, height, ph, width, pw).permute(0, 2, 4, 3, 5, 1)
    tokens = merged.copy(tokens.reshape(batch, height * width, ph * pw * channels))
    x = tokens.reshape(batch, *full, ph, pw, channels).permute(0, 5, 1, 3, 2, 4)
    return F.avg_pool2d(x.reshape(batch, channels, full[0] * ph, full[1] * pw), reduction, ceil_mode=True)


@dataclass(frozen=True)
class Held:
    """A merged map x, what the site did to patches of `patch` pixels, and how much coarser x is since."""

    x: Tensor
    merged: Merged
    patch: tuple[int, int]
    reduction: int = 1


class OneCall(tuple[Callable[[Tensor], Tensor]]):
    """A function as a stage: timm calls it, or walks its parts when it checkpoints gradients."""

    def __call__(self, x: Tensor) -> Tensor:
        return self[0](x)


def restoring(stages: Iterable[nn.Module]) -> Iterator[OneCall]:
    """One callable a stage: takes what the one before returned, returns the stage's map on the original grid."""
    return (OneCall((call,)) for call in handing_on(partial(_restored, stage) for stage in stages))


def _restored(stage: nn.Module, x: Tensor, held: Held | None) -> tuple[Tensor, Held | None]:
    owner: Any = next((m for m in stage.modules() if hasattr(m, "sites")), None)
    if owner is not None:
        with captured(next(iter(dict(owner.sites.named_children()).values()))) as seen:
            x = stage(x)
        held = Held(x, seen[0], owner.patch_size) if seen and seen[0].plan is not None else None
    elif held is not None:
        held = replace(held, x=stage(held.x), reduction=held.reduction * stride_of(stage))
    else:
        x = stage(x)
    return (x if held is None else restore_map(held.x, held.merged, held.patch, held.reduction)), held


def stride_of(stage: nn.Module) -> int:
    """How much a stage reduces its map: by one strided convolution, beside whose shortcut others may stand."""
    return max((m.stride[0] for m in stage.modules() if isinstance(m, nn.Conv2d)), default=1)


class MergedStages(nn.Sequential):
    """A model's stages, one of which merges the map for good."""

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.children():
            x = stage(x)
        return x

    def __iter__(self) -> Iterator[Any]:
        return restoring(self.children())


class MergedFeatures(FeatureListNet):
    """timm's features_only net over such stages; timm walks its items."""

    def items(self) -> Any:
        return zip(self.keys(), restoring(self.values()))


def restore_features(model: nn.Module) -> None:
    """Let features of a model that merges once be taken on the original grid."""
    for parent in [m for m in model.modules() if isinstance(getattr(m, "stages", None), nn.Sequential)]:
        parent.stages = MergedStages(OrderedDict(parent.stages.named_children()))  # type: ignore[operator, union-attr]
    for net in [m for m in model.modules() if type(m) is FeatureListNet]:
        net.__class__ = MergedFeatures


def forget_features(model: nn.Module) -> None:
    """Undo `restore_features`."""
    replace_modules(model, MergedStages, lambda merged: nn.Sequential(OrderedDict(merged.named_children())))
    for net in [m for m in model.modules() if type(m) is MergedFeatures]:
        net.__class__ = FeatureListNet  # type: ignore[assignment]

"""Put mergers into a model and take them out again.

Inserting twice is inserting once; removing restores timm's own modules with the very parameters they had. Nothing is kept
on the model besides modules, parameters and buffers, so it can be exported as often as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import Family, Settings, family_of
from .errors import UsageError, check_count, lookup
from .macs import blank_image, solve_keep_ratio
from .mergers import check_merger, classes_of
from .mergers.ibtm import IBTM
from .modes import evaluating, fed
from .plan import identity
from .site import Merged, Site
from .tokens import check_ratio


@dataclass(frozen=True)
class SiteTrace:
    """What happened at one site: assignment S [B, P, N], weights w [B, N] and merged sizes [B, P].

    In the sequence layout of Swin, and nowhere else, B counts windows.
    """

    path: str
    assignment: Tensor
    weights: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Step:
    """What one site is set to, and what it makes of one image: tokens that enter (entering) and leave (kept)."""

    path: str
    keep_ratio: float
    entering: int
    kept: int

    def __str__(self) -> str:
        return f"{self.path} keeps {self.kept} of {self.entering} tokens (keep ratio {self.keep_ratio:.3g})"


def insert_mergers(
    model: nn.Module,
    *,
    merger: str = "ibtm",
    keep_ratio: float | Sequence[float] = 0.7,
    macs: float | None = None,
    layout: str = "auto",
    density: str = "auto",
    img_size: int | None = None,
    classes: int | None = None,
) -> nn.Module:
    """Put merge sites into a timm model, in place, and return it.

    merger: a name of `mergers.MERGERS`, or `a+b` for a merger followed by a pruner. keep_ratio: tokens kept / tokens
    entering, for all sites or a list with one a site (ViT: a single ratio is what is left after the last site). macs:
    instead, the share of the base model's multiply-accumulates to meet; the keep ratio is solved for it, at img_size
    (default: the model's own). layout: sequence, grid or auto; density: how often to match, block, stage, once or auto;
    MobileViT has "progressive" too: its blocks merge a bit in each of their first two layers, between attention and MLP
    (a single ratio is what both leave; the list 0.7, 1, 0.7, 1, ... merges at once in the first), and restore at their end.
    classes: of the labels that IBTM is to learn from (default: as many as the model, or the head around it, tells apart).

    Raises UsageError for an unknown name, a ratio outside (0, 1], a pair without meaning, or a model without tokens; the
    model then stays as it was, with the mergers it had.
    """
    family = family_of(model)
    layout = _choose("layout", layout, family.layouts, family.name)
    density = _choose("density", density, family.densities, family.name)
    if density == "once" and layout == "sequence" and family.layouts[0] == "grid":
        raise UsageError(f"density 'once' merges the map of {family.name} for good and needs layout='grid'")
    check_merger(merger, layout, family.attention(model))
    settings = Settings(merger, keep_ratio, layout, density, _classes(model, merger, classes))
    _check_ratios(keep_ratio)
    with _put_back_on_failure(model):
        remove_mergers(model)
        if macs is not None:
            settings = solve_keep_ratio(model, family, settings, macs, img_size)
        _insert(model, family, settings)
    return model


@contextmanager
def _put_back_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever fails inside leaves every module where it was, mergers with their parameters included."""
    before = [(module, type(module), dict(module._modules)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, children in before:
            module.__class__ = kind
            module._modules.clear()
            module._modules.update(children)
        raise


def _insert(model: nn.Module, family: Family, settings: Settings) -> None:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))
    family.insert(model, settings)
    sites = sites_of(model)
    if not sites:
        raise UsageError(f"{type(model).__name__} has no place for a merge site: no {family.name} stage with attention")
    attention, groups = bool(family.attention(model)), set()
    convolved = settings.density == "once" and family.layouts[0] == "grid"
    for path, site in sites.items():
        group = path.rpartition(".")[0]
        site.merger.settle(first=group not in groups, attention=attention, convolved=convolved)
        site.to(like.device, like.dtype).train(model.training)
        groups.add(group)


def remove_mergers(model: nn.Module) -> nn.Module:
    """Take every merge site out of the model, in place: timm's own modules are back, bit for bit."""
    family_of(model).remove(model)
    return model


def sites_of(model: nn.Module) -> dict[str, Site]:
    """The merge sites of a model by their path, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Site)}


def merge_trace(model: nn.Module, images: Tensor) -> list[SiteTrace]:
    """Which token went where with what weight: one SiteTrace for each site that ran, for images [B, 3, H, W], in eval mode.

    Raises UsageError when the model has no sites.
    """
    sites = sites_of(model)
    if not sites:
        raise UsageError("this model has no merge sites; call insert_mergers first")
    seen: list[tuple[str, Merged]] = []
    handles = [
        site.register_forward_hook(lambda _m, _i, out, name=name: seen.append((name, out)))
        for name, site in sites.items()
    ]
    try:
        with evaluating(model):
            fed(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return [SiteTrace(name, _matrix(m), m.weight, m.size) for name, m in seen]


def schedule(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> list[Step]:
    """The steps of a merged model, site by site, for images of img_size pixels (a side, or height and width)."""
    sites = sites_of(model)
    seen = merge_trace(model, blank_image(model, img_size))
    return [Step(t.path, sites[t.path].keep_ratio, *reversed(t.assignment.shape[1:])) for t in seen]


def _matrix(merged: Merged) -> Tensor:
    if merged.plan is None:
        return identity(merged.x.shape[1], like=merged.x).expand(merged.x.shape[0], -1, -1)
    return merged.plan.matrix()


def _choose(kind: str, value: str, known: tuple[str, ...], family: str) -> str:
    if value == "auto":
        return known[0]
    everywhere = {"layout": ("sequence", "grid"), "density": ("block", "stage", "once", "progressive")}[kind]
    lookup(kind, value, dict.fromkeys(everywhere))
    if value not in known:
        raise UsageError(f"{kind} {value!r} has no meaning for {family}; it has {', '.join(known)}")
    return value


def _check_ratios(keep_ratio: float | Sequence[float]) -> None:
    if not isinstance(keep_ratio, Sequence) or isinstance(keep_ratio, str):
        check_ratio(keep_ratio)  # type: ignore[arg-type]
        return
    for ratio in keep_ratio:
        check_ratio(ratio)


def _classes(model: nn.Module, merger: str, given: int | None) -> int:
    """How many classes the labels have: as given, or as the model shows. UsageError where a merger has to know and cannot."""
    if given is not None:
        check_count("classes", given)
    found = given or _classes_of(model)
    if not found and any(issubclass(kind, IBTM) for kind in classes_of(merger)):
        raise UsageError(
            f"{type(model).__name__} does not show how many classes it tells apart, which merger {merger!r} has to know; "
            "give classes=N, the number of classes of the labels"
        )
    return found


def _classes_of(model: nn.Module) -> int:
    """What the timm model says, wherever it is wrapped; where it has no head, the outputs of the last linear around it."""
    backbones: list[Any] = [m for m in model.modules() if hasattr(m, "num_classes")]
    inside = {m for backbone in backbones for m in backbone.modules()}
    heads = [m.out_features for m in model.modules() if isinstance(m, nn.Linear) and backbones and m not in inside]
    return int(next((b.num_classes for b in backbones if b.num_classes), heads[-1] if heads else 0))

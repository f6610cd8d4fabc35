"""Fits the buffers of IBTM's mask modules to training data.

A model's mask modules (mergers.ibtm.IBStep) are found by type; the model runs over some training images while hooks
collect each site's pooled features; clusters are fitted and loaded into the buffers, equal on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ibtm.batches import class_numbers
from edge_ibtm.mergers import IBStep
from edge_ibtm.modes import evaluating
from edge_ibtm.statistics import all_sum, fit_clusters

Batches = Iterable[tuple[Tensor, Tensor]]


@contextmanager
def site_features(steps: dict[str, IBStep]) -> Iterator[dict[str, list[Tensor]]]:
    """While active, every forward adds x~ [b, D] (the tokens pooled by the mask that enters) of each site."""
    kept: dict[str, list[Tensor]] = {name: [] for name in steps}

    def hook(name: str) -> Any:
        def keep(module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
            normed, logits, size = inputs
            kept[name].append(module.pooled(normed, torch.sigmoid(logits) * size))

        return keep

    handles = [step.register_forward_pre_hook(hook(name)) for name, step in steps.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def mask_modules(model: nn.Module) -> dict[str, IBStep]:
    """Path -> mask module of every IBTM site."""
    return {name: m for name, m in model.named_modules() if isinstance(m, IBStep)}


def refresh_mask_buffers(
    model: nn.Module, batches: Batches, accelerator: Any = None, clusters: int | None = None
) -> int:
    """Fill C, Q, prior and L of every IBTM site from this rank's batches (images [b, 3, H, W], labels [b]).

    accelerator: sums statistics over its ranks. clusters: how many of the module's A clusters are used (default all);
    the others repeat the first ones. Returns the number of sites filled; 0 for a model without IBTM, which reads no
    batch at all.
    """
    steps = mask_modules(model)
    if not steps:
        return 0
    labels: list[Tensor] = []
    with evaluating(model) as device, site_features(steps) as kept:
        for images, y in batches:
            model(images.to(device))
            labels.append(y.to(device))
    y = class_numbers(torch.cat(labels), next(iter(steps.values())).likelihood.shape[1])
    for name, step in steps.items():
        if kept[name]:
            _fill(step, torch.cat(kept[name]), y, clusters, accelerator)
    return len(steps)


def copy_mask_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give every IBTM site of `target` (a weight average of `source`) the buffers of the same site of `source`.

    Statistics are fitted, not trained: averaged, a prior no longer sums to one and centroids leave the unit sphere.
    """
    theirs = mask_modules(target)
    for name, step in mask_modules(source).items():
        for buffer, values in step.named_buffers():
            theirs[name].get_buffer(buffer).copy_(values)


def _fill(step: IBStep, features: Tensor, labels: Tensor, clusters: int | None, accelerator: Any) -> None:
    room, classes = step.likelihood.shape
    beta = step.beta if not isinstance(step.beta, Tensor) else None
    fitted = fit_clusters(
        features, labels, classes, count=min(clusters or room, room), beta=beta, reduce=all_sum(accelerator)
    )
    index = torch.arange(room, device=features.device) % len(fitted.centroids)
    copies = torch.bincount(index, minlength=len(fitted.centroids)).float()[index]
    likelihood = fitted.likelihood[index] / copies[:, None]  # a cluster that is there twice is half as likely
    step.load_statistics(fitted.centroids[index], likelihood, fitted.prior)
    if isinstance(step.beta, Tensor):
        step.beta.fill_(fitted.beta)


def last_features(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """(pooled last features [n, D], unit rows; labels [n]) of this rank's batches."""
    from edge_ibtm.finetune_loss import pooled_features

    features, labels = [], []
    with evaluating(model) as device, pooled_features(model) as kept:
        for images, y in batches:
            model(images.to(device))
            features.append(F.normalize(kept[0].float(), dim=-1))
            labels.append(y.to(device))
    return torch.cat(features), torch.cat(labels)

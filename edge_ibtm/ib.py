"""Measures the information bottleneck of a model on labelled images: after every merge site, and of its last features.

    IB = I(x~; x) - I(x~; y)    lower is better: the features keep what tells the class and little else of the input.

Clusters are fitted on the measured images themselves (information.py). The input x is the image averaged to 8 x 8
pixels and centred, which is the same for every model, so that figures of models can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from edge_ibtm.errors import UsageError
from edge_ibtm.finetune_eval import evaluation_batches
from edge_ibtm.finetune_loss import classifier_of, pooled_features
from edge_ibtm.information import ib_bound, input_entropy
from edge_ibtm.modes import evaluating
from edge_ibtm.statistics import JointCounter, all_sum, default_clusters, fit_clusters

LAST = "last features"


@dataclass(frozen=True)
class IBMeasure:
    """Figures in nats, of `images` images. ib = with_inputs - with_labels; bound and bound_conditional are above it
    (the first plus input_entropy)."""

    place: str
    ib: float
    with_inputs: float
    with_labels: float
    bound: float
    bound_conditional: float
    input_entropy: float
    images: int


def input_features(images: Tensor, side: int = 8) -> Tensor:
    """x [n, 3 * side^2]: images [n, 3, H, W] averaged to side x side pixels and centred one by one."""
    small = F.adaptive_avg_pool2d(images, side).flatten(1)
    return small - small.mean(1, keepdim=True)


def measure_ib(
    features: Tensor, inputs: Tensor, labels: Tensor, classes: int, *, place: str = LAST, accelerator: Any = None
) -> IBMeasure:
    """IB loss and its bounds for this rank's features [n, D], inputs [n, E] and labels [n].

    Both are clustered into min(classes, 256) clusters, each with the sharpness that fits its spread. With several ranks
    the joints are summed; the bounds are means over ranks.
    """
    reduce = all_sum(accelerator)
    count = default_clusters(classes)
    merged = fit_clusters(features, labels, classes, count=count, reduce=reduce)
    source = fit_clusters(inputs, labels, classes, count=count, reduce=reduce)
    phi, phi_input = merged.assign(features).double(), source.assign(inputs).double()
    counter = JointCounter.empty(count, count, classes)
    counter.add(phi, phi_input, labels)
    with_inputs, with_labels = counter.joints(reduce)
    q = merged.likelihood.double()
    bounds = [ib_bound(phi, phi_input, labels, q, conditional=c) for c in (False, True)]
    world = accelerator.num_processes if accelerator else 1
    bound, conditional, entropy = (reduce(torch.stack([*bounds, input_entropy(phi_input)])) / world).tolist()
    info = [_information(joint) for joint in (with_inputs, with_labels)]
    images = int(reduce(counter.samples.clone()))
    return IBMeasure(place, info[0] - info[1], info[0], info[1], bound, conditional, entropy, images)


def _information(joint: Tensor) -> float:
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.where(joint > 0, joint * (joint / product).log(), torch.zeros_like(joint)).sum())


@contextmanager
def merged_features(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """While active, a forward adds the pooled LayerNormed tokens [b, D] that leave each site, averaged by size."""
    from edge_ibtm.surgery import sites_of

    sites = sites_of(model)
    kept: dict[str, list[Tensor]] = {name: [] for name in sites}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, __: Any, merged: Any) -> None:
            tokens = F.layer_norm(merged.x.float(), merged.x.shape[-1:])
            share = merged.size.float() / merged.size.float().sum(1, keepdim=True)
            pooled = (share.unsqueeze(1) @ tokens).squeeze(1)
            # a site may see several groups of tokens an image (patch positions, windows)
            kept[name].append(pooled)

        return keep

    handles = [site.register_forward_hook(hook(name)) for name, site in sites.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def model_ib(
    model: nn.Module,
    data: Dataset | DataLoader,
    *,
    classes: int | None = None,
    batch_size: int = 64,
    images: int | None = None,
    accelerator: Any = None,
) -> list[IBMeasure]:
    """IB of the tokens after every site, in order, then of the last features; at most `images` images of `data`.

    A model without sites gives the last features alone; insert merger="identity" to measure an unmerged model at the
    same places. classes: default, the model's number of outputs. Raises UsageError when `images` is below 1.
    """
    if images is not None and images < 1:
        raise UsageError(f"images is {images}; give at least 1, or None for all")
    outputs = classes or int(classifier_of(model).out_features)  # type: ignore[arg-type]
    inputs, labels, last = [], [], []
    seen = 0
    with evaluating(model) as device, merged_features(model) as kept, pooled_features(model) as head:
        for batch, y in evaluation_batches(data, batch_size, accelerator):
            left = len(y) if images is None else images - seen
            batch, y = batch[:left], y[:left]
            model(batch.to(device))
            inputs.append(input_features(batch))
            labels.append(y)
            last.append(head[0].float())
            seen += len(y)
            if images is not None and seen >= images:
                break
    y, x = torch.cat(labels).to(last[0].device), torch.cat(inputs).to(last[0].device)
    places = {**{name: _per_image(parts, labels) for name, parts in kept.items() if parts}, LAST: torch.cat(last)}
    return [measure_ib(f, x, y, outputs, place=name, accelerator=accelerator) for name, f in places.items()]


def _per_image(parts: list[Tensor], labels: list[Tensor]) -> Tensor:
    """Pooled features [n, D]; groups of one image, which follow one another, are averaged."""
    means = [p.reshape(len(y), -1, p.shape[-1]).mean(1) for p, y in zip(parts, labels, strict=True)]
    return torch.cat(means)

"""Clusters of pooled features and their class statistics, summed over all ranks.

Every function sees only this rank's samples; sums are all-reduced, so 2 ranks with half the samples each end with the
buffers of 1 rank with all of them. Spherical k-means (features and centroids L2-normalised).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_ibtm.errors import EdgeIBTMError
from edge_ibtm.information import joint_with_inputs, joint_with_labels, normalize_counts, soft_assign

MAX_CLUSTERS = 256
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Clusters:
    """centroids [A, D] unit rows; likelihood Q(a|y) [A, classes]; prior [classes]; beta: sharpness of phi."""

    centroids: Tensor
    likelihood: Tensor
    prior: Tensor
    beta: float

    def assign(self, features: Tensor) -> Tensor:
        """phi [n, A] of pooled features [n, D] of any length."""
        return soft_assign(F.normalize(features.float(), dim=-1), self.centroids, self.beta)


def all_sum(accelerator: Any = None) -> Reduce:
    """Sum of a tensor over the ranks of an accelerate.Accelerator; None: this process alone."""
    if accelerator is None or accelerator.num_processes == 1:
        return lambda tensor: tensor
    return lambda tensor: accelerator.reduce(tensor, reduction="sum")


def default_clusters(classes: int) -> int:
    """Number of clusters A: the number of classes, at most 256 (DESIGN 3.1)."""
    return min(classes, MAX_CLUSTERS)


def class_means(features: Tensor, labels: Tensor, classes: int, reduce: Reduce) -> Tensor:
    """Unit mean direction of each class [classes, D]; a class without samples gets the mean of all."""
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
    sums = reduce(sums)
    seen = sums.norm(dim=-1, keepdim=True) > 0
    return F.normalize(torch.where(seen, sums, sums.sum(0, keepdim=True)), dim=-1)


def initial_centroids(features: Tensor, labels: Tensor, classes: int, count: int, reduce: Reduce) -> Tensor:
    """Start of k-means [count, D]: class means; fewer clusters than classes: means of classes taken together;
    more: each class mean shifted along fixed random directions."""
    means = class_means(features, labels, classes, reduce)
    if count <= classes:
        group = torch.arange(classes, device=means.device) % count
        return F.normalize(means.new_zeros(count, means.shape[1]).index_add_(0, group, means), dim=-1)
    rng = torch.Generator().manual_seed(0)
    shift = torch.randn(count, means.shape[1], generator=rng).to(means)
    shift[:classes] = 0
    spread = (means - means.mean(0)).norm(dim=-1).mean()
    repeated = means[torch.arange(count, device=means.device) % classes]
    return F.normalize(repeated + spread * F.normalize(shift, dim=-1), dim=-1)


def kmeans(features: Tensor, centroids: Tensor, reduce: Reduce, iterations: int = 10) -> Tensor:
    """Lloyd's iterations on unit features [n, D] from centroids [A, D]; an empty cluster stays where it is."""
    for _ in range(iterations):
        nearest = (features @ centroids.T).argmax(-1)
        sums = reduce(torch.zeros_like(centroids).index_add_(0, nearest, features))
        moved = torch.where(sums.norm(dim=-1, keepdim=True) > 0, F.normalize(sums, dim=-1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def sharpness(features: Tensor, centroids: Tensor, reduce: Reduce) -> float:
    """beta at which an average cluster has A^-2 times the weight of the nearest one: 2 log A / mean distance gap.

    Squared distances between unit features shrink with depth and width of a network; a fixed beta would make phi
    uniform at one site and one-hot at another.
    """
    if centroids.shape[0] == 1:
        return 1.0
    distance = 2 - 2 * features @ centroids.T
    gap = reduce(torch.stack([(distance.mean(-1) - distance.amin(-1)).sum(), distance.new_tensor(len(distance))]))
    return 2 * math.log(centroids.shape[0]) / max(float(gap[0] / gap[1]), 1e-6)


def fit_clusters(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    count: int | None = None,
    beta: float | None = None,
    reduce: Reduce = lambda tensor: tensor,
) -> Clusters:
    """Clusters of this rank's pooled features [n, D] and labels [n], the statistics summed over ranks by `reduce`.

    count: number of clusters, default min(classes, 256). beta: default by `sharpness`.
    Errors: EdgeIBTMError when features are not finite.
    """
    # double: so that the order of summation over ranks does not decide which cluster a sample falls into
    unit = F.normalize(features.detach().double(), dim=-1)
    if not bool(torch.isfinite(unit).all()):
        raise EdgeIBTMError(
            f"features of {len(features)} samples are not finite; look for NaN or infinity in the images, or lower the "
            "learning rate"
        )
    start = initial_centroids(unit, labels, classes, count or default_clusters(classes), reduce)
    centroids = kmeans(unit, start, reduce)
    beta = sharpness(unit, centroids, reduce) if beta is None else beta
    counts = torch.zeros(centroids.shape[0], classes, dtype=unit.dtype, device=unit.device)
    counts.index_add_(1, labels, soft_assign(unit, centroids, beta).T)
    seen = torch.bincount(labels, minlength=classes).to(unit)
    counts, seen = reduce(counts), reduce(seen)
    return Clusters(centroids.float(), normalize_counts(counts).float(), (seen / seen.sum().clamp_min(1)).float(), beta)


@dataclass
class JointCounter:
    """Streaming P(a, b) and P(a, y): add batches, read joints that sum to one over all ranks."""

    with_inputs: Tensor
    with_labels: Tensor
    samples: Tensor

    @classmethod
    def empty(cls, merged: int, inputs: int, classes: int) -> JointCounter:
        """Zero counts for A = merged, B = inputs clusters."""
        double = torch.float64
        return cls(
            torch.zeros(merged, inputs, dtype=double),
            torch.zeros(merged, classes, dtype=double),
            torch.zeros((), dtype=double),
        )

    def add(self, phi_merged: Tensor, phi_input: Tensor, labels: Tensor) -> None:
        """Count a batch: phi [n, A], phi [n, B], labels [n]."""
        n = len(labels)
        merged, inputs = phi_merged.double().cpu(), phi_input.double().cpu()
        self.with_inputs += joint_with_inputs(merged, inputs) * n
        self.with_labels += joint_with_labels(merged, labels.cpu(), self.with_labels.shape[1]) * n
        self.samples += n

    def joints(self, reduce: Reduce = lambda tensor: tensor) -> tuple[Tensor, Tensor]:
        """(P(a, b) [A, B], P(a, y) [A, classes])."""
        total = reduce(self.samples.clone())
        return reduce(self.with_inputs.clone()) / total, reduce(self.with_labels.clone()) / total

"""What training data give: checked once, here, so that a wrong label or loader never trains on garbage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from edge_ibtm.errors import UsageError


def check_loader(loader: DataLoader) -> None:
    """UsageError where a loader chooses images: batches are cut anew, so that ranks and resumed runs agree."""
    if isinstance(loader.dataset, IterableDataset):
        return
    sampler, batches = loader.sampler, loader.batch_sampler
    plain = type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
    if isinstance(sampler, RandomSampler):
        plain = plain and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    if not plain or type(batches) not in (BatchSampler, type(None)):
        name = type(batches if plain else sampler).__name__
        raise UsageError(
            f"the loader's {name} would be ignored, as the order and batches of images are made here; give the images it "
            "chooses as torch.utils.data.Subset(dataset, indices), or a loader without it"
        )


def checked(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as (images [b, 3, H, W] float32, labels [b] int64 or distributions [b, classes]).

    Errors: UsageError that says what a batch is instead.
    """
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise UsageError(f"a sample must be (image, label), got {_described(batch)}; wrap the data set")
        images, labels = batch
        if not isinstance(images, Tensor) or images.ndim != 4 or images.dtype != torch.float32:
            raise UsageError(f"images must be normalised float32 tensors [3, H, W], a batch of them is {_described(images)}")
        whole = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
        if not whole and not _is_distribution(labels):
            raise UsageError(f"labels must be one integer an image, a batch of them is {_described(labels)}")
        yield images, labels if labels.is_floating_point() else labels.long()


def class_numbers(labels: Tensor, classes: int) -> Tensor:
    """Labels [b], of distributions [b, classes] the likeliest. Errors: UsageError outside 0 .. classes - 1."""
    labels = labels.argmax(-1) if _is_distribution(labels) else labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UsageError(f"labels run from {low} to {high}, the model has classes 0 to {classes - 1}; number them from 0 on")
    return labels


def _is_distribution(labels: Any) -> bool:
    return isinstance(labels, Tensor) and labels.ndim == 2 and labels.is_floating_point() and labels.shape[1] > 1


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values, the first {_described(value[0])}" if value else "empty"
    return type(value).__name__

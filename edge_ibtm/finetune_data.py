"""Batches whose content is a pure function of (seed, epoch, step): no random state to save, exact resume.

The order of an epoch is a permutation drawn from (seed, epoch); every sample's augmentation is drawn from (seed, epoch,
index). So neither the number of workers or ranks nor an interruption changes what the model sees.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from edge_ibtm.batches import check_loader, checked
from edge_ibtm.errors import UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augmentation:
    """What is done to every training image [3, H, W], normalised with `mean` and `std`; zeros switch parts off.

    crop: pixels of reflection padding before a random crop. flip: mirror with probability 1/2.
    randaugment: magnitude 0..30 of two random operations (RandAugment, arXiv 1909.13719).
    random_erasing: probability of erasing a rectangle (arXiv 1708.04896).
    """

    flip: bool = False
    crop: int = 0
    randaugment: int = 0
    random_erasing: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def build(self) -> Callable[[Tensor], Tensor] | None:
        """The transform of one image, or None when every part is off."""
        from torchvision.transforms import v2

        mean, std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        parts: list[Any] = []
        if self.crop:
            parts.append(_RandomShift(self.crop))
        if self.flip:
            parts.append(v2.RandomHorizontalFlip())
        if self.randaugment:
            parts += [
                lambda x: ((x * std + mean).clamp(0, 1) * 255).to(torch.uint8),
                v2.RandAugment(num_ops=2, magnitude=self.randaugment),
                lambda x: (x.float() / 255 - mean) / std,
            ]
        if self.random_erasing:
            parts.append(v2.RandomErasing(p=self.random_erasing))
        return v2.Compose(parts) if parts else None


class _RandomShift:
    """Random crop at the image's own size after reflection padding."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        padded = torch.nn.functional.pad(image[None], [self.pad] * 4, mode="reflect")[0]
        y, x = (int(v) for v in torch.randint(0, 2 * self.pad + 1, (2,)))
        return padded[..., y : y + h, x : x + w]


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (CPU generator) from a tuple of integers."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    torch.default_generator.manual_seed(int(state[0]) << 32 | int(state[1]))


class SeededDataset(Dataset):
    """Samples of one epoch: (image, label) whose augmentation depends on (seed, epoch, index) alone."""

    def __init__(
        self, data: Dataset, seed: int, epoch: int, transform: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.data, self.seed, self.epoch, self.transform = data, seed, epoch, transform

    def __getitem__(self, index: int) -> Any:
        seed_everything(self.seed, self.epoch, index)
        sample = self.data[index]
        if self.transform is None or not isinstance(sample, (tuple, list)):
            return sample
        return self.transform(sample[0]), *sample[1:]


@dataclass(frozen=True)
class Plan:
    """How `samples` are cut: `batch` images an optimizer step, over `accumulate` micro-batches and `world` ranks."""

    samples: int
    batch: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    @property
    def step_images(self) -> int:
        """Images of one optimizer step: `batch`, or the whole set when it is smaller."""
        parts = self.accumulate * self.world
        return min(self.batch, self.samples // parts * parts)

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch; an incomplete last step is dropped."""
        return self.samples // self.step_images

    @property
    def micro(self) -> int:
        """Images of one micro-batch on one rank."""
        return self.step_images // (self.accumulate * self.world)

    def check(self) -> None:
        """Raise UsageError when the batch cannot be cut into equal parts."""
        parts = self.accumulate * self.world
        if self.batch % parts:
            raise UsageError(
                f"batch_size {self.batch} is not a multiple of accumulate x processes = "
                f"{self.accumulate} x {self.world}; choose a multiple of {parts}"
            )
        if self.samples < parts:
            raise UsageError(
                f"{self.samples} training images are fewer than accumulate x processes = {parts}; add images"
            )

    def indices(self, seed: int, epoch: int, first_step: int = 0) -> Iterator[list[int]]:
        """Micro-batches of this rank from `first_step` on, `accumulate` lists a step."""
        rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(self.samples, generator=rng).tolist()
        size = self.micro * self.world
        for start in range(first_step * self.step_images, self.steps * self.step_images, size):
            yield order[start : start + size][self.rank :: self.world]


def as_dataset(data: Dataset | DataLoader) -> tuple[Dataset, dict[str, Any]]:
    """A data set, and the loader options that a given DataLoader carries (its collate function and workers)."""
    if isinstance(data, DataLoader):
        check_loader(data)
        return data.dataset, {"collate_fn": data.collate_fn, "num_workers": data.num_workers}
    return data, {}


def epoch_batches(
    data: Dataset | DataLoader,
    plan: Plan,
    position: tuple[int, int, int],
    transform: Callable[[Tensor], Tensor] | None = None,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training micro-batches (images [b, 3, H, W], labels [b]); position = (seed, epoch, first step).

    A streaming data set (WebDataset) shuffles itself: there a resume skips batches, exact only if its order is.
    """
    seed, epoch, first = position
    dataset, options = as_dataset(data)
    options = {"num_workers": workers, **options}
    if isinstance(dataset, IterableDataset):
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        stream = iter(DataLoader(dataset, batch_size=plan.micro, drop_last=True, **options))
        return checked(itertools.islice(stream, first * plan.accumulate, plan.steps * plan.accumulate))
    seeded = SeededDataset(dataset, seed, epoch, transform)
    return checked(DataLoader(seeded, batch_sampler=list(plan.indices(seed, epoch, first)), **options))


def sample_batches(
    data: Dataset | DataLoader, plan: Plan, count: int, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of `count` images for statistics: the same ones every time, a stream's first ones.

    Unaugmented where the data set has an attribute `unaugmented` (`data.Images`), else augmented alike every time.
    """
    dataset, options = as_dataset(data)
    if isinstance(dataset, IterableDataset):
        stream = iter(DataLoader(dataset, batch_size=plan.micro, **options))
        return checked(itertools.islice(stream, -(-count // (plan.micro * plan.world))))
    rng = torch.Generator().manual_seed(seed)
    mine = torch.randperm(len(dataset), generator=rng)[:count][plan.rank :: plan.world].tolist()  # type: ignore[arg-type]
    cut = [mine[i : i + plan.micro] for i in range(0, len(mine), plan.micro)]
    seeded = SeededDataset(getattr(dataset, "unaugmented", dataset), seed, 0)
    return checked(DataLoader(seeded, batch_sampler=cut, **options))

"""Accuracy of a model on labelled images, over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from edge_ibtm.batches import checked, class_numbers
from edge_ibtm.errors import UsageError
from edge_ibtm.finetune_data import as_dataset
from edge_ibtm.modes import evaluating
from edge_ibtm.statistics import all_sum


@dataclass(frozen=True)
class Evaluation:
    """top1 in percent, mean cross-entropy in nats, over `images` images."""

    top1: float
    loss: float
    images: int


def evaluation_batches(
    data: Dataset | DataLoader, batch_size: int, accelerator: Any = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches (images [b, 3, H, W], labels [b]), in order, every image once over all ranks."""
    dataset, options = as_dataset(data)
    if isinstance(dataset, IterableDataset):
        return checked(DataLoader(dataset, batch_size=batch_size, **options))
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = list(range(rank, len(dataset), world))  # type: ignore[arg-type]
    cut = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return checked(DataLoader(dataset, batch_sampler=cut, **options))


def predictions(model: nn.Module, data: Dataset | DataLoader, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """(predicted class [n], label [n]) of every image in order, in this process alone, in eval mode."""
    batches = evaluation_batches(data, batch_size)
    with evaluating(model) as device:
        pairs = [(model(images.to(device)).argmax(-1).cpu(), labels) for images, labels in batches]
    return torch.cat([p for p, _ in pairs]), torch.cat([y for _, y in pairs])


def evaluate(
    model: nn.Module, data: Dataset | DataLoader, *, batch_size: int = 64, accelerator: Any = None
) -> Evaluation:
    """Top-1 and loss of the model in eval mode; each rank takes its part and the counts are summed."""
    with evaluating(model) as device:
        counts = torch.zeros(3, dtype=torch.float64, device=device)
        for images, labels in evaluation_batches(data, batch_size, accelerator):
            logits = model(images.to(device)).float()
            labels = class_numbers(labels, logits.shape[-1]).to(device)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(-1) == labels).sum()
            counts += torch.stack([correct.double(), loss.double(), counts.new_tensor(len(labels))])
    correct, loss, images_seen = all_sum(accelerator)(counts).tolist()
    if not images_seen:
        raise UsageError("there are no images to evaluate on; give some, or none at all (val=None)")
    return Evaluation(100 * correct / images_seen, loss / images_seen, int(images_seen))

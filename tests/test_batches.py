"""What training refuses instead of learning garbage: loaders that choose, labels and images that are not what they must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune import CPU, coloured, tiny_vit
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from edge_ibtm import insert_mergers
from edge_ibtm.batches import checked, class_numbers
from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.finetune import finetune
from edge_ibtm.finetune_data import as_dataset
from edge_ibtm.finetune_eval import evaluate

DATA = coloured(32)


class Odd(Dataset):
    """Samples made by a function of the index."""

    def __init__(self, sample: object, count: int = 16) -> None:
        self.sample, self.count = sample, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> object:
        return self.sample(index)  # type: ignore[operator]


def image() -> torch.Tensor:
    return torch.rand(3, 32, 32)


@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler(range(8)), WeightedRandomSampler([1.0] * 32, 32), RandomSampler(DATA, replacement=True),
     RandomSampler(DATA, num_samples=8)],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_a_loader_that_chooses_images_is_refused(sampler: object) -> None:
    loader = DataLoader(DATA, batch_size=8, sampler=sampler)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"{type(sampler).__name__} would be ignored.*Subset"):
        finetune(tiny_vit(), loader, None, CPU)
    with pytest.raises(UsageError, match="would be ignored"):
        evaluate(tiny_vit(), loader)


def test_a_loader_of_its_own_batches_is_refused_and_a_shuffling_one_is_not() -> None:
    class Mine(BatchSampler):
        pass

    with pytest.raises(UsageError, match="Mine would be ignored"):
        as_dataset(DataLoader(DATA, batch_sampler=Mine(RandomSampler(DATA), 4, False)))
    for loader in (DataLoader(DATA, 4, shuffle=True), DataLoader(DATA, batch_size=None), DataLoader(DATA, 4, drop_last=True)):
        assert as_dataset(loader)[0] is DATA


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda i: (image(), i % 4, i), r"\(image, label\), got 3 values, the first float32 \[16, 3, 32, 32\]"),
        (lambda i: image(), r"\(image, label\), got float32 \[16, 3, 32, 32\]"),
        (lambda i: ((image() * 255).byte(), i % 4), r"normalised float32.*uint8 \[16, 3, 32, 32\]"),
        (lambda i: (image().double(), i % 4), r"normalised float32.*float64"),
        (lambda i: (image()[0], i % 4), r"tensors \[3, H, W\].*float32 \[16, 32, 32\]"),
        (lambda i: (image(), np.array([i % 4])), r"one integer an image.*int64 \[16, 1\]"),
        (lambda i: (image(), float(i % 4)), r"one integer an image.*float64 \[16\]"),
        (lambda i: (image(), "cat"), "one integer an image.*16 values, the first str"),
        (lambda i: (image(), i % 5), "labels run from 0 to 4, the model has classes 0 to 3"),
        (lambda i: (image(), i % 4 - 1), "labels run from -1 to 2"),
        (lambda i: (image(), torch.tensor([0.5, 0.5])), "over 2 classes, the model has 4"),
    ],
)
@pytest.mark.parametrize("merger", ["tome", "ibtm"])
def test_samples_that_cannot_be_are_named(sample: object, message: str, merger: str) -> None:
    model = insert_mergers(tiny_vit(), merger=merger)
    if merger == "ibtm" and "over 2 classes" in message:
        message += "|labels run from"
    with pytest.raises(UsageError, match=message):
        finetune(model, Odd(sample), None, CPU)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_any_integers_are_labels(kind: torch.dtype) -> None:
    (pair,) = checked([(torch.rand(2, 3, 4, 4), torch.tensor([0, 3], dtype=kind))])
    assert pair[1].dtype == torch.int64 and pair[1].tolist() == [0, 3]


def test_distributions_train_with_ibtm_and_are_evaluated_by_their_likeliest_class() -> None:
    soft = Odd(lambda i: (DATA[i][0], torch.nn.functional.one_hot(DATA[i][1], 4).float()), 32)
    hard, model = DATA, insert_mergers(tiny_vit())
    config = replace(CPU, epochs=1, lambda_ib=0.1, ib_start=0.0)
    history = finetune(model, soft, soft, config)
    assert history.epochs[0].losses["ib_bound"] == history.epochs[0].losses["ib_bound"]
    assert history.top1 == evaluate(model, hard).top1
    assert class_numbers(torch.tensor([[0.1, 0.9]]), 2).tolist() == [1]


def test_a_teacher_that_is_the_model_or_has_other_classes_is_refused() -> None:
    base = tiny_vit()
    merged = insert_mergers(base)
    with pytest.raises(UsageError, match="the model itself.*copy of the base"):
        finetune(merged, DATA, None, replace(CPU, distill=1.0), teacher=base)
    for classes in (1, 7):
        with pytest.raises(UsageError, match=f"the teacher has {classes} classes, the model 4"):
            finetune(tiny_vit(), DATA, None, replace(CPU, distill=1.0), teacher=tiny_vit(classes))


def test_models_and_sets_that_cannot_train_are_named() -> None:
    frozen = tiny_vit().requires_grad_(False)
    with pytest.raises(UsageError, match="every parameter is frozen"):
        finetune(frozen, DATA, None, CPU)
    with pytest.raises(UsageError, match="parameters in torch.float16"):
        finetune(tiny_vit().half(), DATA, None, CPU)
    with torch.no_grad(), pytest.raises(UsageError, match="no_grad"):
        finetune(tiny_vit(), DATA, None, CPU)
    with pytest.raises(UsageError, match="validation set is empty"):
        finetune(tiny_vit(), DATA, Odd(None, 0), CPU)
    with pytest.raises(UsageError, match="a generator, has no length"):
        finetune(tiny_vit(), (x for x in DATA), None, CPU)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="config is a dict"):
        finetune(tiny_vit(), DATA, None, {"epochs": 1})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no optimizer 'adamq'"):
        finetune(tiny_vit(), DATA, None, replace(CPU, optimizer="adamq"))


def test_a_run_without_one_finite_step_is_no_result() -> None:
    data = Odd(lambda i: (image() * float("nan"), i % 4))
    with pytest.raises(EdgeIBTMError, match="none of 2 steps had a finite gradient"):
        finetune(tiny_vit(), data, None, CPU)


@pytest.mark.parametrize("other", [{"merger": "tome", "keep_ratio": 0.6}, {"merger": "tofu", "keep_ratio": 0.8}, None])
def test_a_checkpoint_of_other_sites_is_refused(other: dict[str, object] | None, tmp_path: Path) -> None:
    config = replace(CPU, epochs=1, checkpoint_dir=tmp_path)
    finetune(insert_mergers(tiny_vit(), merger="tome", keep_ratio=0.8), DATA, None, config)
    again = finetune(insert_mergers(tiny_vit(), merger="tome", keep_ratio=0.8), DATA, None, config)
    assert again.resumed_at == 2
    with pytest.raises(UsageError, match="other settings or for another model"):
        finetune(insert_mergers(tiny_vit(), **other) if other else tiny_vit(), DATA, None, config)  # type: ignore[arg-type]

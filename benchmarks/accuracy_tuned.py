"""Experiment (b): MobileViT-XXS and EfficientViT-B0 at 128 px on CIFAR-10, merged and fine-tuned, every method alike.

The base model is trained once (`accuracy.py base`). With a `Setup` of its own the same cells run on any labelled images
and full-size models (`accuracy.py run --experiment b --data /data/imagenet --weights pretrained`). A cell inserts a method
into the base, fine-tunes on a number of training images (0: off the shelf), and is evaluated on test images. One that the
time budget interrupts continues from its checkpoint.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_cells import RECIPE, TRAINING, VARIANTS, Cell, insert, pack, rounded, write
from accuracy_data import asset, load_set, open_set
from torch import nn

import edge_ibtm
from edge_ibtm.finetune import FinetuneConfig, Progress
from edge_ibtm.finetune_data import Augmentation
from edge_ibtm.finetune_eval import predictions
from edge_ibtm.ib import model_ib
from edge_ibtm.macs import count_macs

SIDE, CLASSES = 128, 10
RUNS = Path(__file__).parent.parent / "runs"
LR = {"mobilevit_xxs": 3e-4, "efficientvit_b0": 1e-3}  # EfficientViT has a map merged for good to get used to
MODELS = tuple(LR)
METHODS = (
    "identity", "ibtm", "tome", "tofu", "ltmp", "tome_ltmp", "tofu_ltmp", "uniform", "random", "drop",
    "lower_resolution",
)  # fmt: skip
ABLATIONS = (*(v for v in VARIANTS if v != "ibtm"), *TRAINING)


class TimeUp(Exception):
    """The time budget is used up; a checkpoint was written."""


@dataclass(frozen=True)
class Setup:
    """Where images and base weights come from. source: anything timm's create_dataset takes, None for CIFAR-10;
    side: pixels; weights: `pretrained` or a file, None for the base of this benchmark; batch: images a step."""

    source: str | None = None
    side: int = SIDE
    weights: str | None = None
    batch: int = 50

    @property
    def data(self) -> str:
        """Its name in results."""
        return "cifar10" if self.source is None else Path(self.source).name

    def images(self, model: str, side: int) -> tuple[Any, Any]:
        """(train, test) at `side` pixels, both with `first(count, skip)`."""
        if self.source is not None:
            return open_set(self.source, model, side)[:2]
        return tuple(load_set(self.data, side, train=t) for t in (True, False))  # type: ignore[return-value]

    def base(self, model: str) -> nn.Module:
        """The base model with its weights."""
        classes = CLASSES if self.source is None else open_set(self.source, model, self.side)[2]
        return edge_ibtm.build_model(model, num_classes=classes, weights=self.weights or str(base_path(model)))

    def augmentation(self) -> Augmentation | None:
        """CIFAR-10's; opened data sets have timm's transforms of their own."""
        return Augmentation(flip=True, crop=8) if self.source is None else None


@dataclass(frozen=True)
class Grid:
    """Which cells of experiment (b) are wanted."""

    setup: Setup = Setup()
    models: tuple[str, ...] = MODELS
    ratios: tuple[float, ...] = (0.7, 0.5, 0.9, 0.6, 0.8)
    images: tuple[int, ...] = (0, 5000)
    seeds: tuple[int, ...] = (0, 1, 2)
    ablations: bool = True


def cells(grid: Grid = Grid()) -> list[Cell]:
    """Cells in order of worth: unmerged first, then every method at one ratio and seed after the other."""
    made = []
    for seed in grid.seeds:
        for ratio in grid.ratios:
            for images in grid.images:
                for model in grid.models:
                    methods = METHODS + (_ablations(ratio) if grid.ablations and images else ())
                    for method in methods:
                        r = 1.0 if method == "identity" else ratio
                        deterministic = images == 0 and method not in ("random", "drop")
                        s = 0 if deterministic else seed
                        made.append(Cell("b", grid.setup.data, model, grid.setup.side, method, r, images, s))
    return list(dict.fromkeys(made))


def _ablations(ratio: float) -> tuple[str, ...]:
    """All of them at one keep ratio; at others what tells the merging from the training."""
    return ABLATIONS if ratio == 0.5 else ("ibtm-plain", "ibtm-strong_ib_loss", "tome-distilled", "uniform-distilled")


def base_path(model: str) -> Path:
    """Weights of the base model: those trained by `accuracy.py base`, else the ones that came with the machine."""
    trained = RUNS / "base" / f"{model}_cifar10_{SIDE}.safetensors"
    return trained if trained.is_file() else asset(trained.name)


def _until(deadline: float) -> Any:
    def stop(now: Progress) -> None:
        if now.step % 20 == 0:
            print(f"  {now.step}/{now.steps} loss {now.loss:.3f} eta {now.eta_seconds:.0f} s", flush=True)
        if time.monotonic() > deadline:
            raise TimeUp

    return stop


def train_base(model: str, images: int, epochs: int, deadline: float) -> Path:
    """Train a base model on, or from scratch where there is none, and keep it under runs/base."""
    from safetensors.torch import save_file

    try:
        start: Path | None = base_path(model)
    except edge_ibtm.errors.UsageError:
        start = None
    net = edge_ibtm.build_model(model, num_classes=CLASSES, weights=str(start) if start else None)
    folder = RUNS / "base" / f"{model}-{'on' if start else 'scratch'}-{images}x{epochs}"
    config = FinetuneConfig(
        epochs=epochs, lr=1e-3 if start else 3e-3, warmup_epochs=0.1, batch_size=64, ema=0.998, device="cpu",
        augment=Augmentation(flip=True, crop=8), checkpoint_dir=folder,
    )  # fmt: skip
    train, test = load_set("cifar10", SIDE, train=True), load_set("cifar10", SIDE, train=False).first(2000)
    history = edge_ibtm.finetune(net, train.first(images), test, config, progress=_until(deadline))
    path = RUNS / "base" / f"{model}_cifar10_{SIDE}.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    shutil.rmtree(folder)
    print(f"{model}: {history.top1:.2f} % top-1 on 2000 test images after {images} x {epochs}")
    return path


def side_at_macs(net: nn.Module, side: int, target: int) -> int:
    """Largest side in pixels, a multiple of 4 and at most `side`, at which the unmerged model has at most `target` MACs."""
    return max(s for s in range(side // 2, side + 1, 4) if count_macs(net, s) <= target)


def prepared(cell: Cell, setup: Setup) -> tuple[nn.Module, int, int]:
    """The model with its method, the side of its images, and its MACs."""
    torch.manual_seed(cell.seed)
    model, side = setup.base(cell.model), cell.side
    if cell.method == "lower_resolution":
        merged = insert(setup.base(cell.model), Cell(**{**cell.__dict__, "method": "tome"}))
        side = side_at_macs(model, side, count_macs(merged, side))
    insert(model, cell)
    return model, side, count_macs(model, side)


def run(cell: Cell, test_images: int, deadline: float, setup: Setup = Setup()) -> None:
    """Compute and keep one cell. Raises TimeUp when the deadline comes first."""
    began = time.monotonic()
    model, side, macs = prepared(cell, setup)
    folder = RUNS / "accuracy" / cell.name
    options = {**(RECIPE if cell.method.startswith("ibtm") else {}), **TRAINING.get(cell.method, {})}
    config = FinetuneConfig(
        epochs=1 if cell.images else 0, lr=LR.get(cell.model, 1e-4), batch_size=setup.batch, seed=cell.seed,
        warmup_epochs=0.05, augment=setup.augmentation(), checkpoint_dir=folder, statistics_images=500,
        **options,
    )  # fmt: skip
    part = max(cell.images, 500)
    train, test = setup.images(cell.model, side)
    train = train.first(part, skip=(cell.seed * part) % max(1, len(train) - part + 1))
    teacher = setup.base(cell.model) if options.get("distill") else None
    history = edge_ibtm.finetune(model, train, None, config, teacher=teacher, progress=_until(deadline))
    test = test.first(test_images)
    predicted, labels = predictions(model, test)
    correct = predicted == labels
    measures = [rounded(m) for m in model_ib(model, test, images=1000)]
    loss = history.epochs[-1].losses if history.epochs else {}
    top1 = 100 * float(correct.double().mean())
    result = {"macs": macs, "test_images": len(labels), "at_side": side, "train_loss": loss, "ib": measures[-1],
              "ib_sites": measures[:-1], "runs": [{"seed": cell.seed, "top1": top1, "correct": pack(correct)}],
              "base": Path(setup.weights or base_path(cell.model)).name}  # fmt: skip
    write(cell, result, time.monotonic() - began)
    shutil.rmtree(folder, ignore_errors=True)

"""One training loop on Hugging Face Accelerate: CPU, CUDA, mixed precision, DDP under torchrun; resumable.

    history = finetune(model, train, val, FinetuneConfig(epochs=5), teacher=base)

The loop only knows timm models, data sets of (image, label), and the buffers of IBTM's mask modules, which it refreshes
from the training data at the start of every epoch. An interrupted run with a checkpoint folder continues exactly: the
same command gives the weights of an uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from edge_ibtm.errors import UsageError
from edge_ibtm.finetune_data import Augmentation, as_dataset

Data = Dataset | DataLoader


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one run. Zero or None switches a part off.

    batch_size: images of one optimizer step, over all processes and `accumulate` micro-batches together, so that the
    number of GPUs changes nothing in the mathematics. max_steps: stop after so many optimizer steps in all.
    warmup_epochs: linear warm-up of the learning rate. layer_decay: layer-wise learning rate decay (0.65 .. 0.9).
    ema: decay of the weight average, which is then evaluated and returned. mixup, cutmix: their alphas.
    distill: weight of KL from the teacher. lambda_ib: weight of the IB bound of the pooled last features, on after
    `ib_start` of the epochs. statistics_images: training images that clusters are fitted on at each epoch.
    unmerged_epochs: epochs before `merge` is applied (training from scratch). augment: for tensor data sets without
    transforms of their own. precision: fp32, bf16 or fp16 autocast. device: auto or cpu.
    checkpoint_seconds: at most this long between checkpoints; 0: at every step.
    max_bad_steps: non-finite gradients in a row before the run is given up. of: what else a checkpoint belongs to, such as
    a hash of the recipe's model, data and mergers; one of something else is refused. Without it a checkpoint of the same
    settings, shapes and sites is gone on from, whatever images and weights it was begun with.
    """

    epochs: int = 1
    lr: float = 2e-4
    weight_decay: float = 0.05
    batch_size: int = 64
    seed: int = 0
    max_steps: int | None = None
    warmup_epochs: float = 0.0
    min_lr: float = 1e-6
    optimizer: str = "adamw"
    layer_decay: float | None = None
    clip_grad: float = 1.0
    accumulate: int = 1
    label_smoothing: float = 0.1
    ema: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    distill: float = 0.0
    distill_temperature: float = 1.0
    lambda_ib: float = 0.0
    ib_start: float = 0.3
    ib_clusters: int | None = None
    ib_conditional: bool = False
    statistics_images: int = 2048
    unmerged_epochs: int = 0
    augment: Augmentation | None = None
    precision: str = "fp32"
    device: str = "auto"
    sync_batchnorm: bool = False
    compile: bool = False
    channels_last: bool = True
    workers: int = 0
    eval_every: int = 1
    checkpoint_dir: str | Path | None = None
    checkpoint_seconds: float = 60.0
    resume: bool = True
    tensorboard: bool = False
    log_every: int = 20
    max_bad_steps: int = 10
    of: str = ""

    def check(self) -> None:
        """Raise UsageError that names every value that cannot be."""
        faults = [
            f"{name} is {getattr(self, name)!r}, must be {what}"
            for name, ok, what in (
                ("epochs", isinstance(self.epochs, int) and self.epochs >= 0, "a whole number, 0 or more"),
                ("lr", 0 < self.lr < math.inf, "above 0 and finite"),
                ("distill", 0 <= self.distill < math.inf, "0 or more and finite"),
                ("distill_temperature", 0 < self.distill_temperature < math.inf, "above 0 and finite"),
                ("lambda_ib", 0 <= self.lambda_ib < math.inf, "0 or more and finite"),
                ("statistics_images", self.statistics_images > 0, "above 0"),
                ("batch_size", self.batch_size > 0, "above 0"),
                ("unmerged_epochs", self.unmerged_epochs >= 0, "0 or more"),
                ("accumulate", self.accumulate > 0, "above 0"),
                ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
                ("ema", 0 <= self.ema < 1, "in [0, 1)"),
                ("precision", self.precision in ("fp32", "bf16", "fp16"), "fp32, bf16 or fp16"),
                ("device", self.device in ("auto", "cpu"), "auto or cpu"),
                ("ib_start", 0 <= self.ib_start <= 1, "in [0, 1]"),
            )
            if not ok
        ]
        if faults:
            raise UsageError("finetune: " + "; ".join(faults))


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for a progress bar. loss: mean of the epoch so far; eta_seconds: to the end of the run."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_second: float
    eta_seconds: float


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. losses: means of the parts of the training loss; top1 in percent, None when not evaluated."""

    epoch: int
    losses: dict[str, float]
    lr: float
    images_per_second: float
    top1: float | None
    val_loss: float | None


@dataclass
class History:
    """What a run did. top1: percent on `val` at the end (None without val); steps: optimizer steps in all."""

    epochs: list[EpochMetrics] = field(default_factory=list)
    top1: float | None = None
    val_loss: float | None = None
    steps: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    resumed_at: int | None = None


def finetune(
    model: nn.Module,
    train: Data,
    val: Data | None = None,
    config: FinetuneConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    merge: Callable[[nn.Module], object] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> History:
    """Train `model` in place on (image [3, H, W], label) pairs and leave it in eval mode.

    teacher: base model to distil from (config.distill). merge: surgery applied in place after config.unmerged_epochs.
    progress: called after every optimizer step; what it raises ends the run after a checkpoint was written.
    With epochs = 0 only the buffers of IBTM's mask modules are filled from `train`.
    Errors: UsageError for settings that cannot be; EdgeIBTMError when training diverges or a checkpoint cannot be
    written.
    """
    from edge_ibtm.finetune_loop import Run

    config = FinetuneConfig() if config is None else config
    if not isinstance(config, FinetuneConfig):
        raise UsageError(f"config is a {type(config).__name__}; give a FinetuneConfig")
    config.check()
    if config.distill and teacher is None:
        raise UsageError(f"distill is {config.distill} but no teacher was given; pass teacher=, or set it to 0")
    if config.distill and teacher is model:
        raise UsageError("the teacher is the model itself, as mergers are put in in place; pass a copy of the base made before")
    _check_data(train, val)
    _check_model(model, config)
    began = time.monotonic()
    run = Run(model, train, config, teacher, merge)
    history = run.train(val, progress)
    history.seconds += time.monotonic() - began
    return history


def _check_data(train: Data, val: Data | None) -> None:
    """UsageError for sets without images or, for training, without a length."""
    images: Any = as_dataset(train)[0]
    checked: Any = None if val is None else as_dataset(val)[0]
    if not hasattr(images, "__len__"):
        raise UsageError(f"the training set, a {type(images).__name__}, has no length; give it a __len__ of its images")
    for name, dataset in (("training", images), ("validation", checked)):
        if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset) and len(dataset) == 0:
            raise UsageError(f"the {name} set is empty; check the data source")


def _check_model(model: nn.Module, config: FinetuneConfig) -> None:
    """UsageError for a model that no step could train."""
    other = {str(p.dtype) for p in model.parameters() if p.dtype != torch.float32}
    if other:
        raise UsageError(f"the model has parameters in {', '.join(sorted(other))}; call .float(); precision autocasts")
    if config.epochs and not torch.is_grad_enabled():
        raise UsageError("finetune was called under no_grad or inference_mode; call it outside")
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("every parameter is frozen; set requires_grad of those that are to be trained")

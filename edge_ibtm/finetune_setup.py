"""Accelerator, optimizer and schedule of a training run."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edge_ibtm.errors import UsageError

if TYPE_CHECKING:
    from edge_ibtm.finetune import FinetuneConfig


def build_accelerator(config: FinetuneConfig) -> Any:
    """An accelerate.Accelerator; picks up torchrun's and accelerate launch's processes by itself.

    A group of processes made here, not by the caller, is left when the process ends.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    AcceleratorState._reset_state(reset_partial_state=False)  # a process may train twice with other settings
    found = _group()
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        cpu=config.device == "cpu",
        # parameters of mask modules have no gradient before merging starts
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if not found and _group() == "gloo":
        atexit.register(_leave)
    return accelerator


def _group() -> str | None:
    """Backend of the group of processes that this one is in."""
    group = torch.distributed
    return str(group.get_backend()) if group.is_available() and group.is_initialized() else None


def _leave() -> None:
    """Gloo's threads, still running when the interpreter is gone, abort a process that has done all its work.

    NCCL only warns, and would wait for other ranks, which may have failed.
    """
    if _group() == "gloo":
        torch.distributed.destroy_process_group()


def build_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """timm's factory: no weight decay on biases and norms, layer-wise decay when asked for."""
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "layer_decay": config.layer_decay}
    try:
        return create_optimizer_v2(model, opt=config.optimizer, **options)
    except (ValueError, AssertionError, TypeError) as error:
        raise UsageError(
            f"timm makes no optimizer {config.optimizer!r} with {options} ({error}); timm.optim.list_optimizers() has the names"
        ) from error


def build_scheduler(optimizer: torch.optim.Optimizer, config: FinetuneConfig, steps: int) -> Any:
    """timm's cosine with linear warm-up, a function of the number of optimizer steps alone."""
    from timm.scheduler.cosine_lr import CosineLRScheduler

    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, config.epochs * steps),
        lr_min=min(config.min_lr, config.lr),
        warmup_t=round(config.warmup_epochs * steps),
        warmup_lr_init=config.lr / 100,
        t_in_epochs=False,
    )


def carry_state(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Give `new` the state of the parameters that both optimizers hold."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]

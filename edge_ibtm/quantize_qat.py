"""Quantization-aware training: fine-tune with rounding in the graph, then convert.

Source: torchao's prepare_qat_pt2e; batch norms are folded before, so nothing of them is left to train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from edge_ibtm.errors import UsageError

Finetune = Callable[[nn.Module], Any]


def quantize_qat(model: nn.Module, calibration: Iterable[Any], finetune: Finetune, *, batch_size: int) -> nn.Module:
    """The converted int8 graph (batch 1) of `model` after quantization-aware training; the model is untouched.

    calibration: batches of images [B, 3, H, W]; they set the ranges before training. finetune: trains the module it is
    given in place, on batches of exactly `batch_size` images; `.train()` and `.eval()` work on it.
    """
    from edge_ibtm.quantize import converted, images_of

    images = torch.cat([images_of(batch) for batch in calibration])
    if len(images) < batch_size:
        raise UsageError(f"{len(images)} calibration images do not fill one batch of {batch_size}")
    training = _prepare(model, images[:batch_size])
    _calibrate(training, [batch for batch in images.split(batch_size) if len(batch) == batch_size])
    finetune(training)
    single = _prepare(model, images[:1])
    _copy_state(training, single)
    single.eval()
    return converted(single)


def _prepare(model: nn.Module, example: torch.Tensor) -> Any:
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    from edge_ibtm.quantize import capture_graph, quantizer

    prepared = prepare_qat_pt2e(capture_graph(model, example), quantizer(qat=True))
    with torch.no_grad():
        prepared(example)
    return allow_exported_model_train_eval(prepared)


def _calibrate(training: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Set the activations' ranges to what they span over all batches in float, and keep them; weights' go on moving.

    Left to itself an observer keeps the first batch's, moved by a hundredth a call, and where a concatenation's inputs share
    one, by turns towards either input's: the wider is cut off.
    """
    from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize, disable_fake_quant, enable_fake_quant

    spans: dict[Any, list[torch.Tensor]] = {}

    def widen(stage: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        low, high = inputs[0].detach().aminmax()
        known = spans.setdefault(stage, [low, high])
        spans[stage] = [torch.minimum(known[0], low), torch.maximum(known[1], high)]

    stages = [m for m in training.modules() if isinstance(m, FusedMovingAvgObsFakeQuantize) and not m.is_per_channel]
    hooks = [stage.register_forward_pre_hook(widen) for stage in stages]
    training.apply(disable_fake_quant)
    with torch.no_grad():
        for batch in batches:
            training(batch)
    training.apply(enable_fake_quant)
    for hook in hooks:
        hook.remove()
    for stage, (low, high) in spans.items():
        stage.activation_post_process.min_val.copy_(low)
        stage.activation_post_process.max_val.copy_(high)
        scale, zero_point = stage.calculate_qparams()
        stage.scale.copy_(scale)
        stage.zero_point.copy_(zero_point)
        stage.disable_observer()


def _copy_state(source: nn.Module, target: nn.Module) -> None:
    """Weights and ranges from the training graph to the one for single images; constants of a batch's shape stay."""
    mine = target.state_dict()
    given = {k: v for k, v in source.state_dict().items() if k in mine and mine[k].shape == v.shape}
    target.load_state_dict({**mine, **given})

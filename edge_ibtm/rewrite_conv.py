"""Batch normalisation folded into the convolution before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Fold every batch norm that directly follows a convolution in timm's conv-norm-act modules; in place."""
    from timm import layers
    from timm.models.efficientvit_mit import ConvNormAct

    for module in model.modules():
        if type(module) is layers.ConvNormAct and isinstance(module.bn, layers.BatchNormAct2d):
            folded = _fold(module.conv, module.bn)
            if folded is not None:
                module.conv, module.bn = folded, _tail(module.bn)
        elif type(module) is ConvNormAct and isinstance(module.norm, nn.BatchNorm2d):
            folded = _fold(module.conv, module.norm)
            if folded is not None:
                module.conv, module.norm = folded, nn.Identity()
    return model


def _tail(norm: Any) -> nn.Module:
    """What a BatchNormAct2d does after normalising: its activation."""
    return norm.act


def _fold(conv: nn.Module, norm: Any) -> nn.Module | None:
    """The convolution (no subclass that pads or resizes) with the norm's scale and shift in it."""
    if type(conv) is not nn.Conv2d or norm.running_mean is None or norm.training:
        return None
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        if conv.bias is not None:
            shift = shift + conv.bias.double() * scale
        weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(conv.weight.dtype)
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        conv.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=conv.weight.requires_grad)
    return conv


def is_pointwise(conv: Any) -> bool:
    """Whether a module is a 1 x 1 Conv2d that reads every place alone."""
    kind = (1, 1), (1, 1), (0, 0), 1
    return type(conv) is nn.Conv2d and (conv.kernel_size, conv.stride, conv.padding, conv.groups) == kind

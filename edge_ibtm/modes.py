"""Running a model for a moment: in eval mode, on images it may not take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import UsageError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode without gradients, afterwards every module's own mode; gives the model's device."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        model.train(modes[0][1])  # an exported graph has more to switch than a flag
        for module, training in modes:
            module.training = training


def fed(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs for images [B, C, H, W]. Errors: UsageError where timm says that their size does not fit."""
    try:
        return model(images)  # type: ignore[no-any-return]
    except AssertionError as error:
        raise UsageError(f"the model does not take images of {images.shape[-2]} x {images.shape[-1]} px: {error}") from error

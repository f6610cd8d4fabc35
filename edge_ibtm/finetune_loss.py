"""The training loss: cross-entropy + lambda_ib * IB bound of the pooled last features + distillation (DESIGN 3.3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ibtm.errors import UsageError
from edge_ibtm.information import ib_bound, soft_assign
from edge_ibtm.statistics import Clusters


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels [b] to smoothed distributions [b, classes]; distributions pass unchanged."""
    if labels.ndim == 2 and labels.shape[1] == classes:
        return labels
    if labels.ndim == 2:
        raise UsageError(f"labels are distributions over {labels.shape[1]} classes, the model has {classes}")
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), logits [b, classes] -> scalar (Hinton et al., arXiv 1503.02531)."""
    if logits.shape != teacher_logits.shape:
        raise UsageError(f"the teacher has {teacher_logits.shape[-1]} classes, the model {logits.shape[-1]}; give its own base")
    student = F.log_softmax(logits.float() / temperature, -1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, -1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def classifier_of(model: nn.Module) -> nn.Module:
    """The last linear layer, whose input is the pooled last feature [b, D]."""
    head = model.get_classifier()  # type: ignore[operator]
    return head[-1] if isinstance(head, (nn.Sequential, nn.ModuleList)) else head


@contextmanager
def pooled_features(model: nn.Module) -> Iterator[list[Tensor]]:
    """While active, a forward of the (unwrapped) model leaves its pooled last features [b, D] in the list."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[:] = [inputs[0]]

    handle = classifier_of(model).register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@dataclass(frozen=True)
class LossWeights:
    """What the terms weigh; see FinetuneConfig."""

    label_smoothing: float = 0.1
    lambda_ib: float = 0.0
    ib_conditional: bool = False
    distill: float = 0.0
    distill_temperature: float = 1.0


def ib_term(features: Tensor, labels: Tensor, clusters: Clusters, conditional: bool) -> Tensor:
    """IB bound of pooled features [b, D] against the current clusters -> scalar.

    The input term of the paper's bound is no function of the weights and is left out.
    """
    phi = soft_assign(F.normalize(features.float(), dim=-1), clusters.centroids, clusters.beta)
    certain = torch.ones(len(phi), 1, device=phi.device)
    return ib_bound(phi, certain, labels, clusters.likelihood, conditional=conditional)


def training_loss(
    weights: LossWeights,
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None = None,
    ib: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and its detached parts; logits [b, classes], targets [b] or [b, classes]."""
    soft = soft_targets(targets, logits.shape[-1], weights.label_smoothing)
    total = -(soft * F.log_softmax(logits.float(), -1)).sum(-1).mean()
    parts: dict[str, Any] = {"ce": total.detach()}
    if teacher_logits is not None:
        term = distillation(logits, teacher_logits, weights.distill_temperature)
        total, parts["distill"] = total + weights.distill * term, term.detach()
    if ib is not None:
        total, parts["ib_bound"] = total + weights.lambda_ib * ib, ib.detach()
    return total, parts

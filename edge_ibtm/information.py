"""Information bottleneck of features against inputs and labels, from soft cluster assignments alone.

All quantities are in nats. `phi [n, A]` holds one soft assignment a row (rows sum to one), `q [A, classes]`
one distribution over clusters a column. Sources: the bound of "Efficient Visual Transformer by Information
Bottleneck Inspired Token Merging" and of LTM (arXiv 2407.15219); the conditional bound is Fischer's
conditional entropy bottleneck (arXiv 2002.05379) on cluster assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12


def soft_assign(features: Tensor, centroids: Tensor, beta: float | Tensor) -> Tensor:
    """phi(x, a) = softmax_a(-beta |x - C_a|^2): features [n, D], centroids [A, D] -> [n, A].

    |x|^2 is the same for every a and cancels, so one matrix product does it.
    """
    return torch.softmax(beta * (2 * features @ centroids.T - centroids.square().sum(-1)), dim=-1)


def class_likelihood(phi: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Q(a|y) = sum_i phi(i, a) [y_i = y] / #{y_i = y}: phi [n, A], labels [n] -> [A, classes].

    Columns sum to one; the column of a class without samples is uniform.
    """
    counts = phi.new_zeros(phi.shape[1], classes).index_add_(1, labels, phi.T)
    return normalize_counts(counts)


def normalize_counts(counts: Tensor) -> Tensor:
    """Columns of counts [A, classes] to distributions; an empty column becomes uniform."""
    total = counts.sum(0, keepdim=True)
    uniform = torch.full_like(counts, 1 / counts.shape[0])
    return torch.where(total > 0, counts / total.clamp_min(EPS), uniform)


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(EPS).log()


def _entropy(p: Tensor) -> Tensor:
    return -(p * _log(p)).sum()


def _mutual_information(joint: Tensor) -> Tensor:
    """I of a joint distribution [A, B] that sums to one."""
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint * (_log(joint) - _log(independent))).sum()


def joint_with_inputs(phi_merged: Tensor, phi_input: Tensor) -> Tensor:
    """P(a, b) = 1/n sum_i phi(x~_i, a) phi(x_i, b): -> [A, B]."""
    return phi_merged.T @ phi_input / phi_merged.shape[0]


def joint_with_labels(phi_merged: Tensor, labels: Tensor, classes: int) -> Tensor:
    """P(a, y) = 1/n sum_i phi(x~_i, a) [y_i = y]: -> [A, classes]."""
    counts = phi_merged.new_zeros(phi_merged.shape[1], classes).index_add_(1, labels, phi_merged.T)
    return counts / phi_merged.shape[0]


def ib_from_joints(with_inputs: Tensor, with_labels: Tensor) -> Tensor:
    """IB = I(x~; x) - I(x~; y) from the joints P(a, b) [A, B] and P(a, y) [A, classes]."""
    return _mutual_information(with_inputs) - _mutual_information(with_labels)


def ib_loss(phi_merged: Tensor, phi_input: Tensor, labels: Tensor, classes: int) -> Tensor:
    """IB = I(x~; x) - I(x~; y): phi of merged features [n, A], of inputs [n, B], labels [n] -> scalar."""
    return ib_from_joints(joint_with_inputs(phi_merged, phi_input), joint_with_labels(phi_merged, labels, classes))


def ib_bound(phi_merged: Tensor, phi_input: Tensor, labels: Tensor, q: Tensor, *, conditional: bool = False) -> Tensor:
    """Variational upper bound of the IB loss -> scalar.

    phi_merged [n, A], phi_input [n, B], labels [n], q [A, classes] any distribution of clusters by class.
    The paper's bound IBB satisfies IB <= IBB + input_entropy(phi_input). With `conditional` the bound is
    IBB_cond = mean_i KL(phi(x~_i) || Q(. | y_i)) >= IB, which does not use phi_input (DESIGN 3.1).
    """
    cross_entropy = -(phi_merged * _log(q.T[labels])).sum(-1).mean()
    source = phi_merged if conditional else phi_input
    return (source * _log(source)).sum(-1).mean() + cross_entropy


def input_entropy(phi_input: Tensor) -> Tensor:
    """H(x): entropy of the input clusters' marginal, phi [n, B] -> scalar."""
    return _entropy(phi_input.mean(0))


def posterior(q: Tensor, prior: Tensor) -> Tensor:
    """Qhat(y|a) = Q(a|y) pi(y) / sum_y: q [A, classes], prior [classes] -> [A, classes], rows sum to one.

    A cluster that no class ever uses gets the prior itself.
    """
    joint = q * prior
    total = joint.sum(1, keepdim=True)
    return torch.where(total > EPS, joint / total.clamp_min(EPS), (prior / prior.sum()).expand_as(q))


def ib_step_matrix(q: Tensor, prior: Tensor, floor: float = 1e-4) -> Tensor:
    """L[a, a'] = -sum_y log Q(a|y) Qhat(y|a') -> [A, A]: psi = L phi needs no label (DESIGN 3.2).

    `floor` bounds Q from below: a cluster never seen with a class must not outweigh all others.
    """
    return -(q.clamp_min(floor).log() @ posterior(q, prior).T)


def ib_gradient(
    features: Tensor,
    centroids: Tensor,
    step: Tensor,
    beta: float | Tensor,
    conditional: bool = False,
    on_sphere: bool = False,
) -> Tensor:
    """Closed form of d IBB / d x~: features [B, D], centroids [A, D], step L [A, A] -> v [B, D] (DESIGN 3.2).

        psi = L phi (+ log phi, conditional bound);   v = 2 beta sum_a phi_a (psi_a - <phi, psi>) C_a

    The class posterior inside psi is held fixed. `on_sphere` drops the part of v along the features: the
    gradient for L2-normalised x~. A site pools m = sum_n w_n s_n z_n / sum_n w_n s_n and x~ = m / |m|; then
    <m, v> = 0 and d IBB / d w_n is a positive multiple of <z_n, v>, so that g_n - eta <z_n, v> descends for
    every small eta > 0, which the plain v does not promise. Matrix products and a softmax only: it exports.
    """
    phi = soft_assign(features, centroids, beta)
    psi = phi @ step.T
    if conditional:
        psi = psi + _log(phi)
    pull = phi * (psi - (phi * psi).sum(-1, keepdim=True))
    v = 2 * beta * pull @ centroids
    if on_sphere:
        v = v - (v * features).sum(-1, keepdim=True) * features
    return v

"""IB loss, its bounds and the IB step, against brute force, autograd and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from edge_ibtm import information as info

TOL = 1e-9


def random_problem(seed: int, sharp: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """phi_merged, phi_input, labels, classes: correlated with one another when `sharp` is large."""
    rng = torch.Generator().manual_seed(seed)
    n, a, b, classes = (int(torch.randint(lo, hi, (1,), generator=rng)) for lo, hi in
                        ((2, 60), (2, 9), (2, 12), (2, 6)))
    labels = torch.randint(0, classes, (n,), generator=rng)
    hint = torch.randn(classes, a, generator=rng, dtype=torch.double)[labels]
    merged = torch.softmax(sharp * (hint + torch.randn(n, a, generator=rng, dtype=torch.double)), -1)
    inputs = torch.softmax(sharp * torch.randn(n, b, generator=rng, dtype=torch.double), -1)
    return merged, inputs, labels, classes


problems = given(seed=st.integers(0, 2**31), sharp=st.sampled_from([0.1, 1.0, 5.0, 50.0]))


def brute_force_ib(merged: Tensor, inputs: Tensor, labels: Tensor, classes: int) -> float:
    """The definition, in Python loops: no code shared with the package."""
    n, a_count = merged.shape
    m, x = merged.tolist(), inputs.tolist()

    def information(joint: list[list[float]]) -> float:
        rows = [sum(r) for r in joint]
        cols = [sum(c) for c in zip(*joint, strict=True)]
        return sum(p * math.log(p / (rows[i] * cols[j]))
                   for i, r in enumerate(joint) for j, p in enumerate(r) if p > 0)

    with_inputs = [[sum(m[i][a] * x[i][b] for i in range(n)) / n for b in range(inputs.shape[1])]
                   for a in range(a_count)]
    with_labels = [[sum(m[i][a] for i in range(n) if int(labels[i]) == y) / n for y in range(classes)]
                   for a in range(a_count)]
    return information(with_inputs) - information(with_labels)


@problems
@settings(max_examples=60, deadline=None)
def test_ib_equals_brute_force(seed: int, sharp: float) -> None:
    merged, inputs, labels, classes = random_problem(seed, sharp)
    got = info.ib_loss(merged, inputs, labels, classes)
    assert got.item() == pytest.approx(brute_force_ib(merged, inputs, labels, classes), abs=1e-8)


@problems
@settings(max_examples=150, deadline=None)
def test_both_bounds_hold_for_the_estimated_and_for_any_q(seed: int, sharp: float) -> None:
    merged, inputs, labels, classes = random_problem(seed, sharp)
    ib = info.ib_loss(merged, inputs, labels, classes)
    any_q = torch.softmax(torch.randn(merged.shape[1], classes, dtype=torch.double), 0)
    for q in (info.class_likelihood(merged, labels, classes), any_q):
        assert ib <= info.ib_bound(merged, inputs, labels, q) + info.input_entropy(inputs) + TOL
        assert ib <= info.ib_bound(merged, inputs, labels, q, conditional=True) + TOL


def test_estimated_q_is_the_tightest() -> None:
    merged, inputs, labels, classes = random_problem(3, 1.0)
    best = info.ib_bound(merged, inputs, labels, info.class_likelihood(merged, labels, classes))
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        q = torch.softmax(torch.randn(merged.shape[1], classes, generator=rng, dtype=torch.double), 0)
        assert best <= info.ib_bound(merged, inputs, labels, q)


def digit_features() -> tuple[Tensor, Tensor, Tensor]:
    """Real images, two views: coarse (pooled, stands for merged) and full, L2-normalised; labels."""
    digits = load_digits()
    full = torch.tensor(digits.data)
    coarse = torch.nn.functional.avg_pool2d(full.view(-1, 1, 8, 8), 2).flatten(1)
    normalize = torch.nn.functional.normalize
    return normalize(coarse, dim=-1), normalize(full, dim=-1), torch.tensor(digits.target)


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    means = torch.stack([features[labels == y].mean(0) for y in range(classes)])
    return torch.nn.functional.normalize(means, dim=-1)


@pytest.mark.parametrize("beta", [0.5, 5.0, 50.0])
def test_bounds_hold_on_real_features(beta: float) -> None:
    coarse, full, labels = digit_features()
    merged = info.soft_assign(coarse, class_means(coarse, labels, 10), beta)
    inputs = info.soft_assign(full, class_means(full, labels, 10), beta)
    q = info.class_likelihood(merged, labels, 10)
    ib = info.ib_loss(merged, inputs, labels, 10)
    assert ib <= info.ib_bound(merged, inputs, labels, q) + info.input_entropy(inputs)
    assert info.ib_bound(merged, inputs, labels, q, conditional=True) >= 0
    assert ib <= info.ib_bound(merged, inputs, labels, q, conditional=True)


def test_known_values() -> None:
    """Four samples in two clusters that equal the label: I(x~;y) = log 2, I(x~;x) = log 2 -> IB = 0."""
    labels = torch.tensor([0, 0, 1, 1])
    merged = torch.eye(2)[labels]
    assert info.ib_loss(merged, merged, labels, 2).item() == pytest.approx(0, abs=1e-6)
    every_image_alone = info.ib_loss(torch.eye(4), torch.eye(4), labels, 2)
    assert every_image_alone.item() == pytest.approx(math.log(2), abs=1e-6)
    assert info.input_entropy(torch.eye(4)).item() == pytest.approx(math.log(4), abs=1e-6)
    q = info.class_likelihood(torch.eye(4), labels, 3)
    expected = torch.tensor([[0.5, 0, 0.25], [0.5, 0, 0.25], [0, 0.5, 0.25], [0, 0.5, 0.25]])
    torch.testing.assert_close(q, expected)


def test_soft_assign_is_the_softmax_of_distances() -> None:
    x, c = torch.randn(7, 5), torch.randn(3, 5)
    distances = ((x[:, None] - c[None]) ** 2).sum(-1)
    torch.testing.assert_close(info.soft_assign(x, c, 2.0), torch.softmax(-2.0 * distances, -1))


def test_posterior_is_bayes_and_step_matrix_its_average() -> None:
    q = torch.softmax(torch.randn(4, 3, dtype=torch.double), 0)
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
    p = info.posterior(q, prior)
    assert p[1, 2].item() == pytest.approx((q[1, 2] * 0.3 / (q[1] * prior).sum()).item())
    step = info.ib_step_matrix(q, prior)
    by_hand = -sum(q[2, y].log() * p[1, y] for y in range(3))
    assert step[2, 1].item() == pytest.approx(float(by_hand))
    unused = torch.cat([q, torch.zeros(1, 3)])
    torch.testing.assert_close(info.posterior(unused, prior)[-1], prior)


def problem_of_step(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """centroids [A, D], q [A, classes] and the step matrix, in double precision."""
    rng = torch.Generator().manual_seed(seed)
    centroids = torch.nn.functional.normalize(torch.randn(5, 6, generator=rng, dtype=torch.double), dim=-1)
    q = torch.softmax(2 * torch.randn(5, 4, generator=rng, dtype=torch.double), 0)
    return centroids, q, info.ib_step_matrix(q, torch.full((4,), 0.25, dtype=torch.double))


def bound_at(x: Tensor, centroids: Tensor, log_q: Tensor, p_y: Tensor, conditional: bool) -> Tensor:
    """IBB of one feature x [D] with the class distribution p_y [classes] held fixed, beta = 3."""
    phi = torch.softmax(-3.0 * (x - centroids).square().sum(-1), 0)
    value = -(phi * (log_q @ p_y)).sum()
    return value + (phi * phi.log()).sum() if conditional else value


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_closed_form_agrees_with_finite_differences(seed: int, conditional: bool) -> None:
    centroids, q, step = problem_of_step(seed)
    x = torch.randn(2, 6, dtype=torch.double)
    v = info.ib_gradient(x, centroids, step, 3.0, conditional)
    p_y = info.soft_assign(x, centroids, 3.0) @ info.posterior(q, torch.full((4,), 0.25, dtype=torch.double))
    for i in range(2):
        for d in range(6):
            h = torch.zeros(6, dtype=torch.double)
            h[d] = 1e-6
            up, down = (bound_at(x[i] + s * h, centroids, q.log(), p_y[i], conditional) for s in (1, -1))
            assert v[i, d].item() == pytest.approx(float(up - down) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("conditional", [False, True])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_step_of_a_site_lowers_the_bound(conditional: bool, seed: int) -> None:
    """Tokens pooled with weights, a step on the mask, pooled again: IBB falls for small eta."""
    centroids, q, step = problem_of_step(seed)
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(9, 6, generator=rng, dtype=torch.double)
    g = torch.randn(9, generator=rng, dtype=torch.double)
    size = torch.randint(1, 4, (9,), generator=rng).double()

    def pooled(mask: Tensor) -> Tensor:
        weight = torch.sigmoid(mask) * size
        mean = (weight[:, None] * z).sum(0, keepdim=True) / weight.sum()
        return torch.nn.functional.normalize(mean, dim=-1)

    x = pooled(g)
    p_y = info.soft_assign(x, centroids, 3.0) @ info.posterior(q, torch.full((4,), 0.25, dtype=torch.double))
    v = info.ib_gradient(x, centroids, step, 3.0, conditional, on_sphere=True)
    assert (v * x).sum().abs() < 1e-9
    moved = pooled(g - 1e-5 * z @ v[0])
    before, after = (bound_at(f[0], centroids, q.log(), p_y[0], conditional) for f in (x, moved))
    assert after < before or v.norm() < 1e-6


def test_step_exports() -> None:
    centroids, _, step = (t.float() for t in problem_of_step(0))

    class Step(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return info.ib_gradient(x, centroids, step, 3.0, True, True)

    x = torch.randn(2, 6)
    exported = torch.export.export(Step(), (x,)).module()
    torch.testing.assert_close(exported(x), Step()(x))

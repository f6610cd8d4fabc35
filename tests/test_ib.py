"""Measurement of IB: agrees with the definition, covers every site, and orders good and bad features."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_finetune import coloured, merged_vit, tiny_vit
from torch.utils.data import TensorDataset

import edge_ibtm
from edge_ibtm import information as info
from edge_ibtm.cli_train import _write
from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.ib import LAST, IBMeasure, input_features, measure_ib, model_ib
from edge_ibtm.mergers import IBStep
from edge_ibtm.mergers.products import NormProducts
from edge_ibtm.statistics import JointCounter, class_means, fit_clusters, kmeans
from edge_ibtm.statistics_sites import mask_modules, refresh_mask_buffers


def test_joint_counter_streams_to_the_same_ib() -> None:
    merged, inputs = torch.softmax(torch.randn(90, 5), -1), torch.softmax(torch.randn(90, 7), -1)
    labels = torch.randint(0, 4, (90,))
    counter = JointCounter.empty(5, 7, 4)
    for part in torch.arange(90).split(17):
        counter.add(merged[part], inputs[part], labels[part])
    got = info.ib_from_joints(*counter.joints())
    torch.testing.assert_close(got.float(), info.ib_loss(merged, inputs, labels, 4), atol=1e-6, rtol=1e-5)


def test_measure_agrees_with_information_and_its_bounds() -> None:
    data = coloured(200)
    images, labels = data.tensors
    features = images.flatten(1)[:, ::50]
    got = measure_ib(features, input_features(images), labels, 4)
    clusters = fit_clusters(features, labels, 4)
    inputs = fit_clusters(input_features(images), labels, 4)
    phi, phi_input = clusters.assign(features), inputs.assign(input_features(images))
    assert got.ib == pytest.approx(float(info.ib_loss(phi, phi_input, labels, 4)), abs=1e-4)
    assert got.ib <= got.bound + got.input_entropy and got.ib <= got.bound_conditional
    assert got.ib == pytest.approx(got.with_inputs - got.with_labels) and got.images == 200


def test_features_that_tell_the_class_have_lower_ib_than_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300,), generator=rng)
    telling = torch.eye(4)[labels] + 0.1 * torch.randn(300, 4, generator=rng)
    inputs = torch.randn(300, 20, generator=rng)
    noise = torch.randn(300, 4, generator=rng)
    assert measure_ib(telling, inputs, labels, 4).ib < measure_ib(noise, inputs, labels, 4).ib


def test_every_site_and_the_last_features_are_measured() -> None:
    model, data = merged_vit(), coloured(50)
    sites = list(mask_modules(model))
    measures = model_ib(model, data, batch_size=16)
    assert len(measures) == len(sites) + 1 and measures[-1].place == LAST
    assert all(m.images == 50 for m in measures)
    assert [m.place for m in model_ib(tiny_vit(), data)] == [LAST]
    assert model_ib(model, data, images=20, batch_size=10)[0].images == 20
    assert {m.images for m in model_ib(model, data, images=21, batch_size=16)} == {21}, "not a whole batch more"
    with pytest.raises(UsageError, match="images is 0"):
        model_ib(model, data, images=0)


def test_figures_are_written_into_a_new_folder(tmp_path: Path) -> None:
    measure = IBMeasure(LAST, 0.5, 1.0, 0.5, 2.0, 0.6, 0.1, 20)
    _write(tmp_path / "new" / "x.json", [measure])
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == [asdict(measure)]


@pytest.mark.parametrize("name", ["mobilevit_xxs", "efficientvit_b0"])
def test_grids_are_measured_too(name: str) -> None:
    torch.manual_seed(0)
    model = edge_ibtm.insert_mergers(edge_ibtm.build_model(name, num_classes=4), merger="ibtm", keep_ratio=0.6)
    data = TensorDataset(*(t[:8] for t in coloured(8, size=96).tensors))
    assert refresh_mask_buffers(model, [data.tensors]) > 0
    measures = model_ib(model, data, batch_size=4)
    assert len(measures) > 1 and all(abs(m.ib) < 10 for m in measures)


def test_kmeans_finds_separated_clusters() -> None:
    rng = torch.Generator().manual_seed(0)
    means = torch.nn.functional.normalize(torch.randn(3, 8, generator=rng), dim=-1)
    labels = torch.arange(60) % 3
    points = torch.nn.functional.normalize(means[labels] + 0.05 * torch.randn(60, 8, generator=rng), dim=-1)
    found = kmeans(points, points[:3], lambda t: t)
    torch.testing.assert_close(found, class_means(points, labels, 3, lambda t: t), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_clusters_have_unit_centroids_and_distributions(count: int) -> None:
    features, labels = torch.randn(80, 6), torch.randint(0, 4, (80,))
    c = fit_clusters(features, labels, 5, count=count)  # class 4 has no sample
    assert c.centroids.shape == (count, 6) and c.likelihood.shape == (count, 5)
    torch.testing.assert_close(c.centroids.norm(dim=-1), torch.ones(count))
    torch.testing.assert_close(c.likelihood.sum(0), torch.ones(5))
    torch.testing.assert_close(c.prior, torch.bincount(labels, minlength=5) / 80)
    torch.testing.assert_close(c.likelihood[:, :4], info.class_likelihood(c.assign(features), labels, 4))


def test_features_that_are_not_finite_are_refused() -> None:
    features = torch.randn(8, 6)
    features[3] = float("nan")
    with pytest.raises(EdgeIBTMError, match="look for NaN or infinity in the images, or lower the learning rate"):
        fit_clusters(features, torch.arange(8) % 4, 4)


def test_refresh_fills_the_buffers_of_every_site() -> None:
    model = merged_vit()
    images, labels = coloured(64).tensors
    assert refresh_mask_buffers(tiny_vit(), [(images, labels)]) == 0
    before = {k: v.clone() for k, v in model.named_parameters()}
    assert refresh_mask_buffers(model, [(images[:40], labels[:40]), (images[40:], labels[40:])]) == len(
        mask_modules(model)
    )
    for step in mask_modules(model).values():
        torch.testing.assert_close(step.centroids.norm(dim=-1), torch.ones(len(step.centroids)))
        torch.testing.assert_close(step.step, info.ib_step_matrix(step.likelihood, step.prior))
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    outputs = model(images)
    refresh_mask_buffers(model, [(images, labels.roll(1))])
    assert not torch.equal(model(images), outputs)  # labels reach the forward through the buffers alone


@pytest.mark.parametrize("conditional", [False, True])
def test_the_site_takes_the_step_of_the_closed_form(conditional: bool) -> None:
    """mergers.ibtm writes the step in operators that lower; it is still information.ib_gradient."""
    step = IBStep(6, 4)
    step.conditional = conditional
    features, labels = torch.randn(80, 6), torch.randint(0, 4, (80,))
    c = fit_clusters(features, labels, 4, beta=step.beta)
    step.load_statistics(c.centroids, c.likelihood, c.prior)
    z, g, size = torch.randn(3, 9, 6), torch.randn(3, 9), torch.randint(1, 4, (3, 9)).float()
    x = step.pooled(z, torch.sigmoid(g) * size)
    v = info.ib_gradient(x, step.centroids, step.step, step.beta, conditional, on_sphere=True)
    torch.testing.assert_close(step(z, g, size), g - step.eta * (z @ v[:, :, None])[..., 0], atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(2, 48), st.floats(-30, 30), st.integers(0, 10**6))
def test_products_of_layer_normed_tokens_need_no_layer_norm(
    batch: int, count: int, width: int, offset: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = (offset + torch.randn(batch, count, width, generator=random)).double()  # in float32 large offsets cancel
    vector, v, mass = (torch.rand(n, m, generator=random).double() for n, m in ((1, width), (batch, width), (batch, count)))
    normed = torch.nn.functional.layer_norm(x, (width,), eps=1e-5)
    products = NormProducts(x, lambda a, b: a * x.square().sum(-1) + b, 1e-5, vector)
    wanted = (normed * vector).sum(-1), 0.5 * (normed * v[:, None]).sum(-1), (mass[..., None] * normed).mean(1)
    half = torch.tensor(0.5, dtype=torch.float64)
    got = products.of_vector, products.along(v - v.mean(-1, keepdim=True), half), products.mean(mass)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)  # the constant 1 / D is a float32's


def test_a_token_of_equal_features_normalises_to_nothing() -> None:
    x = torch.full((1, 2, 5), 7.3)
    products = NormProducts(x, lambda a, b: a * x.square().sum(-1) + b, 1e-5)
    v = torch.randn(1, 5)
    assert products.along(v - v.mean(), torch.tensor(1.0)).abs().max() < 0.01

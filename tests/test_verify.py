"""Verification: what it leaves alone, how it sums up, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

from edge_ibtm import insert_mergers
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.errors import UsageError
from edge_ibtm.targets import lower
from edge_ibtm.verify import Limits, compare_outputs, verify


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    torch.manual_seed(0)
    model, size = BACKBONES["mobilevit"].twin()
    insert_mergers(model)
    images = torch.randn(2, 3, size, size)
    return model, lower(model, images[:1], tmp_path_factory.mktemp("pt2") / "m.pt2", target="torch"), images


def test_a_model_in_training_mode_is_judged_in_eval_mode_and_left_as_it_was(lowered):
    model, artifact, images = lowered
    training = copy.deepcopy(model).train()
    before = copy.deepcopy(training.state_dict())
    assert verify(training, artifact, images).sqnr_db >= 100
    assert all(module.training for module in training.modules())
    assert all(torch.equal(before[name], value) for name, value in training.state_dict().items())


@pytest.mark.parametrize(("errors", "median"), [([1e-3, 1e-1], 40), ([1e-3, 1e-1, 1e-2], 40), ([1e-1, 1e-2, 1e-3, 1e-4], 50)])
def test_the_median_of_an_even_number_of_images_is_the_mean_of_both_middles(errors, median):
    wanted = torch.ones(len(errors), 4)
    verdict = compare_outputs(wanted, wanted + torch.tensor(errors)[:, None], Limits(sqnr_db=None, sqnr_median_db=39))
    assert verdict.sqnr_median_db == pytest.approx(median, abs=0.01) and verdict.ok


def test_images_and_limits_that_do_not_fit(lowered):
    model, artifact, images = lowered
    with pytest.raises(UsageError, match=r"several shapes, \[\(3, 16, 32\), \(3, 32, 32\)\]; give all in the one"):
        verify(model, artifact, [images, images[..., :16, :]])
    with pytest.raises(UsageError, match=r"limits is \{'sqnr_db': 3\}; give a Limits"):
        verify(model, artifact, images, limits={"sqnr_db": 3})

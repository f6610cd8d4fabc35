"""Verification: what it leaves alone, how it sums up, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

from edge_ibtm import insert_mergers
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.targets import lower
from edge_ibtm.verify import verify


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

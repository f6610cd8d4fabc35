"""Swin's attention on the map itself: equal, where it applies, and of fewer permutations."""

from __future__ import annotations

import pytest
import timm
import torch
from test_rewrite import shaken, sqnr

import edge_ibtm
from edge_ibtm.rewrite import export_rewritten, prepare_for_export
from edge_ibtm.rewrite_windows import MapBlock, attention_on_maps

OPTIONS = {"num_classes": 7, "img_size": 112, "depths": (2, 2, 1, 1), "window_size": 7}


def swin(**options) -> torch.nn.Module:
    return shaken(timm.create_model("swin_tiny_patch4_window7_224", **{**OPTIONS, **options}))


@pytest.mark.parametrize(
    ("merger", "batch"),
    [(None, 1), ("ibtm", 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((None, 3), ("ibtm", 1)))],
)
def test_it_is_equal(merger, batch):
    model, images = swin(), torch.randn(batch, 3, 112, 112)
    if merger:
        edge_ibtm.insert_mergers(model, merger=merger, keep_ratio=0.7)
    program = export_rewritten(model, (images,), attention_on_maps)
    with torch.no_grad():
        assert sqnr(model(images), program.module()(images)) >= 100


def test_four_permutations_of_a_block_are_left():
    def permutations(further) -> int:
        program = export_rewritten(swin(), (torch.randn(1, 3, 112, 112),), further)
        return sum(n.target is torch.ops.aten.permute.default for n in program.graph.nodes)

    assert permutations(None) - permutations(attention_on_maps) == 2 * sum(OPTIONS["depths"])


def test_the_map_stays_a_map():
    program = export_rewritten(swin(), (torch.randn(1, 3, 112, 112),), attention_on_maps)
    shapes = [tuple(n.meta["val"].shape) for n in program.graph.nodes if n.op == "call_function"]
    assert (1, 28, 28, 96) in shapes and (1, 28 * 28, 96) not in shapes


@pytest.mark.parametrize("options", [{"window_size": 5}, {"strict_img_size": False}])
def test_other_blocks_keep_their_form(options):
    model, images = swin(**options), torch.randn(1, 3, 112, 112)
    twin = attention_on_maps(prepare_for_export(model))
    with torch.no_grad():
        assert sqnr(model(images), twin(images)) >= 100
    kept = [type(b) is not MapBlock for stage in twin.layers for b in stage.blocks]
    assert any(kept)

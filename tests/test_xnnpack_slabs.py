"""Blocks in slabs: every bit of the outputs stays, and what is no such block stays whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_xnnpack_graph import SIGMOID, Graph, kinds_of, lowered
from torch import nn

from edge_ibtm.targets import xnnpack_slabs
from edge_ibtm.targets.runtime import run_pte
from edge_ibtm.targets.xnnpack_values import new_value, tensor_of


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 4), st.integers(4, 40), st.integers(1, 7))
def test_slabs_give_the_rows_of_the_whole(kernel, stride, dilation, padding, rows, count):
    reach = dilation * (kernel - 1) + 1
    out_rows = (rows + 2 * padding - reach) // stride + 1
    assume(padding < reach <= rows + 2 * padding and out_rows >= count)
    deep = SimpleNamespace(
        dilation_height=dilation, kernel_height=kernel, subsampling_height=stride, padding_top=padding, padding_bottom=padding
    )
    x, weight = torch.arange(1.0, rows + 1).reshape(1, 1, -1), torch.arange(3.0, kernel + 3).reshape(1, 1, -1)
    whole = nn.functional.conv1d(nn.functional.pad(x, (padding, padding)), weight, stride=stride, dilation=dilation)
    parts = []
    for slab in xnnpack_slabs.slabs(deep, rows, out_rows, count):
        part = nn.functional.pad(x[..., slab.low : slab.high], (slab.above, slab.below))
        parts.append(nn.functional.conv1d(part, weight, stride=stride, dilation=dilation))
        assert parts[-1].shape[-1] == slab.last - slab.first
    assert torch.equal(torch.cat(parts, -1), whole)


def lowered_in(slab, model, images, path, monkeypatch):
    """The outputs and the kinds of XNNPACK's nodes, cut into slabs of so many bytes; None: not cut."""
    monkeypatch.setattr(xnnpack_slabs, "SLAB", slab or 2**40)
    artifact, graph = lowered(model, images, path, monkeypatch)
    return run_pte(artifact.path, images)[0], [kinds_of(node) for node in graph.xnodes]


class Block(nn.Module):
    """An inverted residual block, and variants of it that may not be cut."""

    def __init__(self, kind: str, stride: int = 1, kernel: int = 3) -> None:
        super().__init__()
        self.kind = kind
        self.wide, self.narrow = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)
        self.deep = nn.Conv2d(16, 16, kernel, stride, kernel // 2, groups=16)
        self.act = {"hardswish": nn.Hardswish(), "relu": nn.ReLU()}.get(kind, nn.SiLU())

    def forward(self, x):
        wide = self.act(self.wide(x))
        deep = self.act(self.deep(wide))
        if self.kind == "read twice":
            deep = deep + wide
        if self.kind == "gated":
            deep = deep * wide
        if self.kind == "weighed":
            deep = deep * torch.linspace(0, 1, deep.shape[2]).reshape(1, 1, -1, 1)
        out = self.narrow(deep)
        return (out, wide) if self.kind == "shown" else out + x if self.kind == "residual" else out


@pytest.mark.parametrize(
    ("kind", "stride", "kernel", "slab", "count"),
    [("silu", 2, 3, 2**13, 6), ("silu", 1, 5, 2**12, 7), ("residual", 1, 3, 2**13, 4), ("silu", 1, 3, 2**15, 0)],
)
def test_a_block_in_slabs_keeps_every_bit(kind, stride, kernel, slab, count, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, images = Block(kind, stride, kernel).eval(), torch.randn(1, 4, 36 if stride == 2 else 28, 18)
    whole, before = lowered_in(None, model, images, tmp_path / "whole.pte", monkeypatch)
    cut, after = lowered_in(slab, model, images, tmp_path / "cut.pte", monkeypatch)
    assert torch.equal(cut, whole)
    assert before.count("DepthwiseConv2d") == 1 and after.count("DepthwiseConv2d") == max(count, 1)
    assert after.count("StaticSlice") == count


@pytest.mark.parametrize("kind", ["read twice", "gated", "weighed", "shown", "batch", "hardswish", "relu"])
def test_other_blocks_stay_whole(kind, tmp_path, monkeypatch):
    model, images = Block(kind).eval(), torch.randn(2 if kind == "batch" else 1, 4, 28, 18)
    got, nodes = lowered_in(2**12, model, images, tmp_path / "m.pte", monkeypatch)
    with torch.no_grad():
        wanted = model(images)
    torch.testing.assert_close(got, wanted[0] if kind == "shown" else wanted, atol=1e-5, rtol=1e-4)
    assert nodes.count("DepthwiseConv2d") == 1 and "StaticSlice" not in nodes


def test_a_mobilevit_in_slabs_keeps_every_bit(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, images = timm.create_model("mobilevit_xxs", num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    whole, before = lowered_in(None, model, images, tmp_path / "whole.pte", monkeypatch)
    cut, after = lowered_in(2**15, model, images, tmp_path / "cut.pte", monkeypatch)
    assert torch.equal(cut, whole) and after.count("DepthwiseConv2d") > before.count("DepthwiseConv2d")


def test_a_new_value_is_rounded_as_the_one_it_is_like():
    made = Graph(2, 3)
    steps = made.convert(0, SIGMOID)
    values = dict(enumerate(made.graph.xvalues))
    new = new_value(values, steps, [1, 2, 3])
    assert new == 2 and values[new].xvalue_union.quant_params == SIGMOID
    assert tensor_of(values[new]).dims == [1, 2, 3] and tensor_of(values[steps]).dims == [2, 3]

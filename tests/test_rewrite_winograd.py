"""Winograd's form of 3 x 3 convolutions: equal to the convolution, only where it pays, in XNNPACK's float files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edge_ibtm
from edge_ibtm.quantize import capture_graph
from edge_ibtm.rewrite import export_rewritten
from edge_ibtm.rewrite_winograd import MIN_CHANNELS, MIN_PLACES, WinogradConv, winograd

side = st.integers(1, 5)
half = st.integers(6, 9)
C = MIN_CHANNELS


@settings(max_examples=60, deadline=None)
@given(
    channels=st.tuples(side, side), halves=st.tuples(half, half), batch=st.integers(1, 3), bias=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_it_equals_the_convolution(channels, halves, batch, bias, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(*channels, 3, padding=1, bias=bias).double()
    x = torch.randn(batch, channels[0], *(2 * h for h in halves), dtype=torch.float64)
    torch.testing.assert_close(WinogradConv(conv)(x), conv(x))


def multiplications(form, x):
    """Of the dense products: what `form` spends on x, and what its convolution would."""
    program = torch.export.export(form, (x,))
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    dense = [n for n in nodes if n.args[1].meta["val"].shape[1] > 1]
    spent = sum(n.meta["val"][0, 0].numel() * n.args[1].meta["val"].numel() for n in dense)
    return spent, form.conv.weight.numel() * x[0, 0].numel()


@pytest.mark.parametrize(("size", "less"), [((16, 8), True), ((14, 14), True), ((8, 8), False), ((16, 15), False)])
def test_four_ninths_of_the_multiplications_on_large_even_maps(size, less):
    assert (size[0] * size[1] >= MIN_PLACES and size[1] % 2 == 0) is less
    form, x = WinogradConv(nn.Conv2d(3, 5, 3, padding=1)), torch.randn(1, 3, *size)
    spent, before = multiplications(form, x)
    assert spent * 9 == before * (4 if less else 9)
    torch.testing.assert_close(form(x), form.conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(C - 1, C, 3, padding=1),
        nn.Conv2d(C, C - 1, 3, padding=1),
        nn.Conv2d(C, C, 1),
        nn.Conv2d(C, C, 3),
        nn.Conv2d(C, C, 5, padding=2),
        nn.Conv2d(C, C, 3, padding=1, stride=2),
        nn.Conv2d(C, C, 3, padding=1, dilation=2),
        nn.Conv2d(C, C, 3, padding=1, groups=C),
        nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(C, C, 3, padding="same"),
    ],
)
def test_other_convolutions_stay(conv):
    assert WinogradConv.of(conv) is conv
    assert isinstance(WinogradConv.of(nn.Conv2d(C, C, 3, padding=1)), WinogradConv)


@pytest.fixture(scope="module")
def merged():
    torch.manual_seed(0)
    model = edge_ibtm.build_model("mobilevit_xxs", num_classes=7).eval()
    return edge_ibtm.insert_mergers(model, merger="ibtm", keep_ratio=0.5)


def transforms(program):
    convolutions = program.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    return sum(tuple(n.args[1].meta["val"].shape[2:]) in ((4, 1), (1, 4)) for n in convolutions)


@pytest.mark.slow
def test_a_float_file_has_it_where_the_map_is_large(merged):
    x = torch.randn(1, 3, 128, 128)  # maps of 16 x 16, 8 x 8 and 4 x 4, two convolutions on each
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    assert transforms(export_rewritten(merged, (x,), winograd)) == 2 * 20
    assert transforms(export_rewritten(merged, (x,))) == 0
    assert all(torch.equal(before[name], value) for name, value in merged.state_dict().items())


@pytest.mark.slow
def test_a_lowered_file_with_it_computes_the_same(merged, tmp_path):
    x = torch.randn(1, 3, 128, 128)
    artifact = edge_ibtm.lower(merged, x, tmp_path / "m.pte")
    assert artifact.subgraphs == 1
    assert edge_ibtm.verify(merged, artifact, x).sqnr_db > 100


def test_a_graph_to_be_quantized_has_none(merged):
    assert transforms(capture_graph(merged, torch.randn(1, 3, 128, 128))) == 0

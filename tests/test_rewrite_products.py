"""Convolutions as products: equal to the convolution, only where they pay, and a target of their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edge_ibtm
from edge_ibtm.config import parse_recipe
from edge_ibtm.rewrite_products import MIN_CHANNELS, ProductConv, convolutions_as_products
from edge_ibtm.stages_artifact import products

side = st.integers(1, 5)
pad = st.integers(0, 3)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(side, side), padding=st.tuples(pad, pad), size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    channels=st.tuples(side, side), batch=st.integers(1, 2), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_products_equal_the_convolution(kernel, padding, size, channels, batch, bias, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(*channels, kernel, padding=padding, bias=bias).double()
    x = torch.randn(batch, channels[0], *size, dtype=torch.float64)
    torch.testing.assert_close(ProductConv(conv)(x), conv(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(MIN_CHANNELS - 1, 8, 3),
        nn.Conv2d(MIN_CHANNELS, 8, 1),
        nn.Conv2d(MIN_CHANNELS, 8, 3, stride=2),
        nn.Conv2d(MIN_CHANNELS, 8, 3, dilation=2),
        nn.Conv2d(MIN_CHANNELS, MIN_CHANNELS, 3, groups=MIN_CHANNELS),
        nn.Conv2d(MIN_CHANNELS, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(MIN_CHANNELS, 8, 3, padding="same"),
    ],
)
def test_other_convolutions_stay(conv):
    assert ProductConv.of(conv) is conv
    assert isinstance(ProductConv.of(nn.Conv2d(MIN_CHANNELS, 8, 3, padding=1)), ProductConv)


@pytest.fixture(scope="module")
def merged():
    torch.manual_seed(0)
    model = edge_ibtm.build_model("mobilevit_xxs", num_classes=7).eval()
    return edge_ibtm.insert_mergers(model, merger="ibtm", keep_ratio=0.5)


def test_the_target_for_avx2_computes_the_same_in_one_subgraph(merged, tmp_path):
    x = torch.randn(1, 3, 64, 64)
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    written = convolutions_as_products(merged)
    assert sum(isinstance(m, ProductConv) for m in written.modules()) == 6  # two in each MobileViT block
    artifact = edge_ibtm.lower(merged, x, tmp_path / "m.pte", target="xnnpack_avx2")
    assert (artifact.target, artifact.subgraphs) == ("xnnpack_avx2", 1)
    assert edge_ibtm.verify(merged, artifact, x).sqnr_db > 100
    assert all(torch.equal(before[name], value) for name, value in merged.state_dict().items())


def test_a_run_for_avx2_has_int8_too():
    asked = parse_recipe({"lower": {"targets": ["xnnpack_avx2"]}})
    assert [p.file for p in products(asked, {"xnnpack_avx2": ".pte"})] == [
        "base.xnnpack_avx2.fp32.pte", "merged.xnnpack_avx2.fp32.pte", "merged.xnnpack_avx2.int8.pte",
    ]  # fmt: skip


def test_a_quantized_graph_is_lowered_as_for_phones(merged, tmp_path):
    x = torch.randn(1, 3, 64, 64)
    converted = edge_ibtm.quantize(merged, [x])
    files = [edge_ibtm.lower(converted, x, tmp_path / f"{t}.pte", target=t) for t in ("xnnpack", "xnnpack_avx2")]
    assert files[0].sha256 == files[1].sha256

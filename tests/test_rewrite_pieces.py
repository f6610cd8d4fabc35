"""Large linear layers in pieces: equal to the whole, only where weights do not fit, in XNNPACK's float files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm import layers
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from edge_ibtm import insert_mergers, lower
from edge_ibtm.quantize import capture_graph
from edge_ibtm.rewrite_pieces import FEW_ROWS, LARGEST, MOST, LinearInPieces, MlpInPieces, in_pieces, pieces
from edge_ibtm.verify import Limits, verify

LARGE = 1024  # 1024 x 1024 float weights are 4 MB
wide = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(sides=st.tuples(wide, wide), count=st.integers(1, 4), rows=st.integers(1, 30), bias=st.booleans())
def test_pieces_equal_the_whole(sides, count, rows, bias):
    torch.manual_seed(rows)
    layer = nn.Linear(sides[0], count * sides[1], bias=bias).double()
    mlp = layers.Mlp(sides[0], count * sides[1], bias=bias).double().eval()
    x = torch.randn(2, rows, sides[0], dtype=torch.float64)
    torch.testing.assert_close(LinearInPieces(layer, count)(x), layer(x))
    torch.testing.assert_close(MlpInPieces(mlp, count)(x), mlp(x))


@pytest.mark.parametrize(
    ("sides", "count"),
    [((384, 1536), 1), ((768, 768), 1), ((1536, 768), 2), ((768, 3072), 4), ((4096, 16384), MOST), ((700, 1009), 1)],
)
def test_the_least_number_of_pieces_that_fit(sides, count):
    layer = nn.Linear(*sides, device="meta")
    assert pieces(layer) == count
    assert 4 * sides[0] * sides[1] / count <= LARGEST or count == MOST or sides[1] == 1009, "a prime number stays whole"


def test_few_rows_stay_whole():
    layer = in_pieces(nn.Linear(LARGE, LARGE))
    assert isinstance(layer, LinearInPieces)
    for rows, products in ((FEW_ROWS, 1), (FEW_ROWS + 1, 2)):
        graph = torch.export.export(layer, (torch.randn(1, rows, LARGE),)).graph
        assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == products


@pytest.mark.parametrize("change", [{"norm_layer": nn.LayerNorm}, {"act_layer": lambda: nn.Softmax(-1)}, {"drop": 0.1}])
def test_an_mlp_that_does_more_keeps_its_order(change):
    """Its layers are cut one by one, where nothing stands between the pieces."""
    torch.manual_seed(0)
    mlp = layers.Mlp(LARGE, LARGE, **change).eval()
    x = torch.randn(1, 20, LARGE)
    with torch.no_grad():
        wanted = mlp(x)
        cut = in_pieces(mlp)
        torch.testing.assert_close(cut(x), wanted, rtol=1e-4, atol=1e-5)
    assert type(cut) is layers.Mlp and isinstance(cut.fc1, LinearInPieces)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return VisionTransformer(32, 8, embed_dim=256, depth=2, num_heads=4, mlp_ratio=12, num_classes=5).eval()


def linears(program) -> int:
    return len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))


def test_only_float_files_of_xnnpack_are_cut(vit):
    from edge_ibtm.targets.common import capture
    from edge_ibtm.targets.xnnpack import _further

    x = torch.randn(1, 3, 32, 32)
    whole = linears(capture(vit, (x,)))
    assert linears(capture(vit, (x,), _further)) > whole == linears(capture_graph(vit, x))


@pytest.mark.parametrize("merger", [None, "ibtm"])
def test_the_artifact_computes_the_model_in_one_subgraph(vit, merger, tmp_path):
    if merger:
        insert_mergers(vit, merger=merger, keep_ratio=0.7)
    x = torch.randn(2, 3, 32, 32)
    artifact = lower(vit, x[:1], tmp_path / "vit.pte")
    assert artifact.subgraphs == 1 and artifact.non_delegated == 0
    assert verify(vit, artifact, x, limits=Limits(sqnr_db=100)).ok

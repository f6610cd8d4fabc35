"""LayerNorms made lighter before export: scale and shift folded into readers, means into writers."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from test_rewrite import shaken, sqnr
from torch import nn

import edge_ibtm
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.rewrite import export_rewritten, prepare_for_export
from edge_ibtm.rewrite_norm import LinearNorm
from edge_ibtm.rewrite_stream import lighten_norms

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def vit(**options) -> nn.Module:
    return shaken(timm.models.VisionTransformer(**VIT, **options))


def norms(model: nn.Module) -> list[LinearNorm]:
    return [m for m in model.modules() if isinstance(m, LinearNorm)]


def means_of_inputs(model: nn.Module, images: torch.Tensor) -> list[float]:
    """The largest mean, relative to the spread, that each norm said to be free of means is given."""
    seen: list[float] = []
    for norm in norms(model):
        if norm.mean_free:
            norm.register_forward_hook(lambda _m, x, _o: seen.append(float((x[0].mean(-1) / x[0].std(-1)).abs().max())))
    with torch.no_grad():
        model(images)
    return seen


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "init_values": 0.5, "qk_norm": True}, {"pos_embed": "none"}])
@pytest.mark.parametrize("merger", [None, "ibtm", "tome"])
def test_a_vit_has_no_means_and_no_scales_left(options, merger):
    model, images = vit(**options), torch.randn(2, 3, 32, 32)
    if merger:
        edge_ibtm.insert_mergers(model, merger=merger, keep_ratio=0.6, density="block")
    twin = prepare_for_export(model)
    with torch.no_grad():
        assert sqnr(model(images), twin(images)) >= 100
    stream = [n for n in norms(twin) if n.mean_free]
    assert len(stream) >= 2 * VIT["depth"] + 1
    assert sum(n.weight is not None for n in stream) == 1  # the last one's, which the head reads
    assert max(means_of_inputs(twin, images)) < 1e-4


def test_a_model_in_double_precision_stays_so():
    model, images = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert sqnr(model(images), prepare_for_export(model)(images)) >= 200


@pytest.mark.parametrize("why", ["norms of tokens count", "features are asked for", "tokens are normed before the blocks"])
def test_a_stream_that_something_else_reads_keeps_its_means(why):
    model, images = vit(pre_norm=why.startswith("tokens")), torch.randn(2, 3, 32, 32)
    if why.startswith("norms"):
        edge_ibtm.insert_mergers(model, merger="tofu", keep_ratio=0.6, density="block")
    if why.startswith("features"):
        model.forward, inner = model.get_intermediate_layers, model
        model = nn.Sequential(inner)
    twin = prepare_for_export(model)
    assert not any(n.mean_free for n in norms(twin))
    wanted, got = model(images), twin(images)
    pairs = zip(wanted, got) if isinstance(wanted, (list, tuple)) else [(wanted, got)]
    assert all(sqnr(a.detach(), b.detach()) >= 100 for a, b in pairs)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("density", [None, "stage", "once", *(pytest.param(d, marks=SLOW) for d in ("block", "progressive"))])
def test_a_mobilevit(density):
    model, size = BACKBONES["mobilevit"].twin()
    shaken(model)
    if density:
        edge_ibtm.insert_mergers(model, merger="ibtm", keep_ratio=0.7, density=density)
    images = torch.randn(2, 3, 2 * size, 2 * size)
    program = export_rewritten(model, (images,))
    twin = prepare_for_export(model)
    with torch.no_grad():
        assert sqnr(model(images), program.module()(images)) >= 100
        assert sqnr(model(images), twin(images)) >= 100
    seen = means_of_inputs(twin, images)
    assert bool(seen) == (density in (None, "stage", "once"))
    assert max(seen, default=0.0) < 1e-4


@pytest.mark.parametrize(("options", "size"), [({"window_size": 5}, 112), ({"strict_img_size": False}, 96)])
def test_a_padded_swin_keeps_the_shift_of_its_first_norms(options, size):
    """Zeros that pad a map to whole windows stand behind the norm: its shift must not reach them."""
    options = {"num_classes": 7, "img_size": 112, "depths": (2, 1, 1, 1), **options}
    model = shaken(timm.create_model("swin_tiny_patch4_window7_224", **options))
    images = torch.randn(1, 3, size, size)
    twin = prepare_for_export(model)
    with torch.no_grad():
        assert sqnr(model(images), twin(images)) >= 100
    assert twin.layers[0].blocks[0].norm1.bias is not None
    assert twin.layers[0].blocks[0].norm2.bias is None


def test_blocks_of_another_kind_are_left_alone():
    model = timm.models.VisionTransformer(**VIT, block_fn=timm.models.vision_transformer.ResPostBlock).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lighten_norms(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_patches_of_a_network_keep_their_means():
    """timm's hybrids embed patches of a convolutional network's map; that module has no norm to look at."""
    embed = partial(timm.layers.HybridEmbed, nn.Conv2d(3, 8, 3, stride=2, padding=1))
    model, images = vit(embed_layer=embed), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert sqnr(model(images), prepare_for_export(model)(images)) >= 100

"""Rewrites: each equals what it replaces, leaves the original alone, and can be applied twice."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed
from timm.models.swin_transformer import WindowAttention
from torch import nn

import edge_ibtm
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.rewrite import export_rewritten, prepare_for_export
from edge_ibtm.rewrite_attention import SplitAttention, SplitWindowAttention
from edge_ibtm.rewrite_norm import LinearNorm, PooledGroupNorm
from edge_ibtm.rewrite_ops import DelegateOps
from edge_ibtm.rewrite_patches import LinearPatches

MODELS = [
    ("mobilevit_xxs", {}, 64),
    ("mobilevit_xxs", {}, 80),
    ("mobilevitv2_050", {}, 64),
    ("efficientvit_b0", {}, 64),
    ("swin_tiny_patch4_window7_224", {"img_size": 112, "depths": (2, 2, 1, 1), "window_size": 7}, 112),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2, "qk_norm": True}, 56),
]


def sqnr(wanted: torch.Tensor, got: torch.Tensor) -> float:
    wanted, got = wanted.double(), got.double()
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum().clamp_min(1e-300)))


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with statistics, scales and shifts that are not the trivial ones of a fresh model."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(("name", "options", "size"), MODELS)
def test_rewritten_model_is_equal(name, options, size):
    model = shaken(timm.create_model(name, num_classes=7, **options))
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, size, size)
    once = prepare_for_export(model)
    twice = prepare_for_export(once)
    with torch.no_grad():
        wanted = model(images)
        assert sqnr(wanted, once(images)) >= 100
        assert torch.equal(once(images), twice(images))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", BACKBONES.values(), ids=lambda f: f.name)
def test_export_of_every_family_is_equal(family):
    model, size = family.twin()
    images = torch.randn(1, 3, size, size)
    program = export_rewritten(shaken(model), (images,))
    with torch.no_grad():
        assert sqnr(model(images), program.module()(images)) >= 100


@pytest.mark.parametrize("mask", ["none", "additive", "boolean", "causal"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"gated": True, "qkv_bias": True}])
def test_attention(mask, options):
    torch.manual_seed(1)
    attn = Attention(24, num_heads=3, **options).eval()
    x, kwargs = torch.randn(2, 5, 24), {}
    if mask == "additive":
        kwargs["attn_mask"] = torch.randn(2, 1, 1, 5)
    elif mask == "boolean":
        kwargs["attn_mask"] = (torch.rand(5, 5) > 0.4) | torch.eye(5).bool()
    elif mask == "causal":
        kwargs["is_causal"] = True
    with torch.no_grad():
        torch.testing.assert_close(SplitAttention.of(attn)(x, **kwargs), attn(x, **kwargs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_takes_sequences_in_turn(qk_norm):
    torch.manual_seed(0)
    split = SplitAttention.of(Attention(24, num_heads=3, qk_norm=qk_norm, norm_layer=nn.LayerNorm).eval())
    x, bias = torch.randn(2, 3, 5, 24), torch.randn(2, 3, 1, 1, 5)  # two images, three sequences of five tokens
    with torch.no_grad():
        each = torch.stack([split(x[:, i], bias[:, i]) for i in range(3)], 2).reshape(2, 15, 24)
        split.sequences = 3
        torch.testing.assert_close(split(x.transpose(1, 2).reshape(2, 15, 24), bias.reshape(6, 1, 1, 5)), each)


def test_attention_can_be_hooked_like_the_original():
    attn = Attention(24, num_heads=3).eval()
    split = SplitAttention.of(copy.deepcopy(attn))
    seen = {}
    for owner, label in ((attn, "old"), (split, "new")):
        for name in ("q_norm", "k_norm", "qkv"):
            getattr(owner, name).register_forward_hook(lambda _m, _i, o, key=(label, name): seen.update({key: o}))
    x = torch.randn(2, 5, 24)
    attn(x), split(x)
    torch.testing.assert_close(seen["old", "k_norm"], seen["new", "k_norm"])
    torch.testing.assert_close(seen["old", "q_norm"] * attn.scale, seen["new", "q_norm"] * split.scale)
    torch.testing.assert_close(seen["old", "qkv"][..., 24:], seen["new", "qkv"][..., 24:])


@pytest.mark.parametrize(("density", "merger"), [("once", "tome"), ("block", "ibtm"), (None, None)])
def test_last_vit_block_computes_the_class_token_alone(density, merger):
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    vit = shaken(timm.models.VisionTransformer(**options, reg_tokens=2, init_values=0.5, qk_norm=True))
    if merger:
        edge_ibtm.insert_mergers(vit, merger=merger, keep_ratio=0.6, density=density)
    twin = prepare_for_export(vit)
    rows = []
    twin.blocks.get_submodule("2").mlp.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert sqnr(vit(images), twin(images)) >= 100
    assert rows == [1]


def test_a_vit_whose_features_are_asked_for_keeps_all_tokens():
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.vit.forward_features(x)

    model, images = Features().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert sqnr(model(images), prepare_for_export(model)(images)) >= 100


def test_a_vit_that_pools_its_tokens_keeps_its_last_block():
    vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, global_pool="avg").eval()
    assert type(prepare_for_export(vit).blocks[-1]) is timm.models.vision_transformer.Block


@pytest.mark.parametrize("masked", [False, True])
def test_window_attention(masked):
    torch.manual_seed(2)
    attn = WindowAttention(24, num_heads=3, window_size=4).eval()
    x = torch.randn(2 * 3, 16, 24)
    mask = (torch.randn(3, 16, 16) > 0).float() * -100 if masked else None
    with torch.no_grad():
        torch.testing.assert_close(SplitWindowAttention.of(attn)(x, mask=mask), attn(x, mask=mask), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mobilevit", "swin"])
def test_merged_models_in_half_precision_export(name):
    model, size = BACKBONES[name].twin()
    model, images = edge_ibtm.insert_mergers(model, keep_ratio=0.7).half(), torch.randn(1, 3, size, size).half()
    with torch.no_grad():
        assert sqnr(model(images).float(), export_rewritten(model, (images,)).module()(images).float()) >= 30


def test_patches_that_do_not_fill_the_image_stay_a_convolution():
    embed, images = shaken(PatchEmbed(img_size=18, patch_size=4, embed_dim=12)), torch.randn(1, 3, 18, 18)
    assert LinearPatches.of(embed) is embed and embed(images).shape == (1, 16, 12)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"norm_layer": nn.LayerNorm}, {"output_fmt": "NHWC"}, {"patch_size": (2, 8)}])
def test_patches(options, batch):
    embed = shaken(PatchEmbed(**{"img_size": (16, 24), "patch_size": 4, "embed_dim": 12, **options}))
    twin, images = LinearPatches.of(embed), torch.randn(batch, 3, 16, 24)
    assert type(twin) is LinearPatches
    torch.testing.assert_close(twin(images), embed(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\(16, 32\).*\(16, 24\)"):
        twin(torch.randn(1, 3, 16, 32))


def test_patches_that_overlap_or_are_padded_stay_convolutions():
    assert type(LinearPatches.of(PatchEmbed(dynamic_img_pad=True))) is PatchEmbed
    assert type(LinearPatches.of(PatchEmbed(output_fmt="NCHW"))) is PatchEmbed
    assert type(LinearPatches.of(PatchEmbed(img_size=None))) is PatchEmbed, "a convolution leaves out what no patch fills"
    overlapping = PatchEmbed(img_size=16, patch_size=4)
    overlapping.proj = nn.Conv2d(3, 768, 7, stride=4, padding=3)
    assert LinearPatches.of(overlapping) is overlapping


def test_norms():
    norm = shaken(nn.LayerNorm(32, eps=1e-3))
    x = 3 * torch.randn(2, 7, 32) + 5
    torch.testing.assert_close(LinearNorm.of(norm)(x), norm(x), atol=1e-5, rtol=1e-5)
    group = shaken(nn.GroupNorm(1, 8))
    y = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(PooledGroupNorm.of(group)(y), group(y), atol=1e-5, rtol=1e-5)
    assert type(LinearNorm.of(nn.LayerNorm((3, 4)))) is nn.LayerNorm
    assert type(PooledGroupNorm.of(nn.GroupNorm(2, 8))) is nn.GroupNorm


CALLS = {
    "roll": lambda x: torch.roll(x, (-1, 2), (1, 2)),
    "roll one": lambda x: torch.roll(x, shifts=3, dims=-1),
    "mean all": lambda x: x.mean(),
    "mean pooling": lambda x: x.mean((2, 3)),
    "pool to one place": lambda x: F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1),
    "pool to more": lambda x: F.adaptive_avg_pool2d(x, (2, 5)),
    "pool rows": lambda x: F.adaptive_avg_pool2d(x, (2, None)),
    "mean last": lambda x: torch.mean(x, -1, keepdim=True),
    "mean middle": lambda x: x.mean(dim=1),
    "sum": lambda x: x.sum((0, 2), keepdim=True),
    "select": lambda x: x[:, 1] + x[:, -1],
    "matmul batched": lambda x: x[0] @ x[1].transpose(1, 2),
    "matmul constant": lambda x: x[0].transpose(1, 2) @ torch.arange(8.0).reshape(4, 2),
    "matmul other": lambda x: torch.matmul(x, x.transpose(2, 3)),
    "select ellipsis": lambda x: x[..., 2] * x[1, ..., 0].sum(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_operators(call):
    x = torch.randn(2, 3, 4, 5)
    with DelegateOps():
        got = call(x)
    torch.testing.assert_close(got, call(x), atol=1e-5, rtol=1e-5)
    assert got.shape == call(x).shape


def test_operators_of_integers_are_left_alone():
    x = torch.arange(12).reshape(3, 4)
    with DelegateOps():
        assert torch.equal(torch.roll(x, 1, 0), x[[2, 0, 1]])
        assert int(x.sum()) == 66


@pytest.mark.parametrize(("size", "batch"), [(64, 2), (80, 1)])
@pytest.mark.parametrize("density", ["stage", "once", "block"])
def test_merged_mobilevits_convolve_their_tokens(density, size, batch):
    model = shaken(timm.create_model("mobilevit_xxs", num_classes=7))
    model = edge_ibtm.insert_mergers(model, merger="tome", density=density, img_size=size)
    images = torch.randn(batch, 3, size, size)
    twin = prepare_for_export(model)
    with torch.no_grad():
        assert sqnr(model(images), twin(images)) >= 100
    kinds = {type(m).__name__ for m in twin.modules()}
    assert "MergedOnTokens" in kinds and "MergedMobileVitBlock" not in kinds


def test_mobilevits_with_other_convolutions_stay_on_maps():
    block = timm.create_model("mobilevit_xxs").eval().stages[2][1]
    wide = nn.Conv2d(48, 64, 3, padding=1, bias=False)
    block.conv_1x1, images = wide, torch.randn(2, 48, 6, 6)
    twin = prepare_for_export(nn.Sequential(block))
    assert twin[0].conv_1x1.kernel_size == (3, 3)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), block(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_vits_features_are_equal():
    model = shaken(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, features_only=True)).eval()
    x = torch.randn(1, 3, 64, 64)
    for wanted, got in zip(model(x), prepare_for_export(model)(x), strict=True):
        assert sqnr(wanted, got) >= 100

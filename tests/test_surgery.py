"""Surgery on whole models: ToMe as published on a ViT, budgets, features, traces, refusals."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import edge_ibtm
from edge_ibtm.backbones import BACKBONES, model_names
from edge_ibtm.errors import UsageError
from edge_ibtm.mergers import IBStep
from edge_ibtm.surgery import schedule, sites_of
from edge_ibtm.tokens import kept_tokens


def tiny_vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    values = dict(img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=7) | options
    return VisionTransformer(**values).eval()  # type: ignore[arg-type]


def published_tome_forward(vit: VisionTransformer, images: Tensor, removed: list[int]) -> Tensor:
    """ToMe on a ViT from the paper and the order of its released code, by sorting and indexing, one image at a time.

    removed: tokens that go in each block. The next block's even/odd split sees the even tokens that stayed first, then
    the odd ones, with a distillation token moved back to place 1.
    """
    outputs, prefix = [], vit.num_prefix_tokens
    for image in images:
        x = vit._pos_embed(vit.patch_embed(image[None]))[0]
        size = torch.ones(len(x))
        for block, remove in zip(vit.blocks, removed):
            attn, normed = block.attn, block.norm1(x)
            q, k, v = attn.qkv(normed).reshape(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            weights = ((q * attn.scale) @ k.transpose(1, 2) + size.log()).softmax(-1)
            x = x + block.ls1(attn.proj((weights @ v).transpose(0, 1).reshape(len(x), -1)))
            metric = torch.nn.functional.normalize(k.mean(0), dim=-1)
            scores = metric[::2] @ metric[1::2].T
            if prefix:
                scores[0] = -float("inf")
            if prefix > 1:
                scores[:, 0] = -float("inf")
            best, partner = scores.max(-1)
            order = torch.argsort(best, descending=True)
            gone, stay = order[:remove], order[remove:]
            stay = stay.sort().values if prefix else stay
            rows = torch.cat([x * size[:, None], size[:, None]], 1)
            odd = rows[1::2].index_add(0, partner[gone], rows[::2][gone])
            rows = torch.cat([rows[::2][stay], odd])
            if prefix > 1:
                dist = len(stay)
                rows = rows[[0, dist, *range(1, dist), *range(dist + 1, len(rows))]]
            x, size = rows[:, :-1] / rows[:, -1:], rows[:, -1]
            x = x + block.ls2(block.mlp(block.norm2(x)))
        outputs.append(vit.forward_head(vit.norm(x[None])))
    return torch.cat(outputs)


def per_block(tokens: int, remove: int, depth: int, counted: int = 0) -> tuple[list[int], list[float]]:
    """ToMe's constant schedule: tokens removed in each block (at most half), and the keep ratios that say so.

    tokens: without class token; counted: prefix tokens that the ratios count in.
    """
    removed, ratios = [], []
    for _ in range(depth):
        removed.append(min(remove, tokens // 2))
        ratios.append((tokens + counted - removed[-1]) / (tokens + counted))
        tokens -= removed[-1]
    return removed, ratios


@torch.no_grad()
@pytest.mark.parametrize(("remove", "counted"), [(8, 0), (13, 1), (16, 0)])
def test_tome_equals_the_published_method_on_a_deit(remove: int, counted: int) -> None:
    vit, images = tiny_vit(img_size=224, patch_size=16, depth=12, init_values=0.7), torch.randn(2, 3, 224, 224)
    removed, ratios = per_block(196, remove, 12, counted)
    expected, base = published_tome_forward(vit, images, removed), vit(images)
    edge_ibtm.insert_mergers(vit, merger="tome", keep_ratio=ratios, density="block")
    assert torch.allclose(vit(images), expected, atol=1e-5) and not torch.allclose(base, expected, atol=1e-4)
    left = [t.assignment.shape[2] - t.assignment.shape[1] for t in edge_ibtm.merge_trace(vit, images)]
    assert left == [r for r in removed if r]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["distilled", "pooled", "registers"])
def test_tome_equals_the_published_method_with_other_prefixes(kind: str) -> None:
    torch.manual_seed(0)
    values = dict(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=7)
    if kind == "distilled":
        vit = VisionTransformerDistilled(**values).eval()
    else:
        vit = tiny_vit(**values, **({"class_token": False, "global_pool": "avg"} if kind == "pooled" else {"reg_tokens": 1}))
    images, (removed, ratios) = torch.randn(2, 3, 64, 64), per_block(64, 7, 4)
    expected = published_tome_forward(vit, images, removed)
    edge_ibtm.insert_mergers(vit, merger="tome", keep_ratio=ratios, density="block")
    if kind == "pooled":
        vit.blocks.restore = False
    assert torch.allclose(vit(images), expected, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_a_ratio_of_counts_keeps_that_count(prefix: int) -> None:
    for free in range(4, 800, 7):
        for remove in range(free // 2 + 1):
            assert kept_tokens(free + prefix, (free - remove) / free, prefix) == free + prefix - remove


EVERY = [(f.name, density) for f in BACKBONES.values() for density in f.densities]
BUDGETS = [(family, density, 0.95 if (family, density) == ("swin", "block") else 0.9) for family, density in EVERY]
FEATURES = {
    "mobilevit": ("mobilevit_xxs", {}), "efficientvit": ("efficientvit_b0", {}),
    "vit": ("vit_tiny_patch16_224", {"img_size": 96}), "swin": ("swin_tiny_patch4_window7_224", {"img_size": 112}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("family", "density"), EVERY)
def test_intermediate_features_have_the_original_grid(family: str, density: str) -> None:
    model, side = BACKBONES[family].twin()
    images = torch.randn(2, 3, side, side)
    before = [f.shape for f in model.forward_intermediates(images, intermediates_only=True)]
    edge_ibtm.insert_mergers(model, keep_ratio=0.6, density=density)
    output = model(images)
    after = model.forward_intermediates(images, intermediates_only=True)
    assert [f.shape for f in after] == before
    assert all(torch.isfinite(f).all() for f in after)
    assert torch.equal(model(images), output)
    deepest = len(before) - 1
    few = model.forward_intermediates(images, indices=[deepest - 1], intermediates_only=True, stop_early=True)
    assert torch.allclose(few[0], after[deepest - 1], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("family", "density"), EVERY)
def test_features_only_models_have_the_original_grid(family: str, density: str) -> None:
    name, options = FEATURES[family]
    model = timm.create_model(name, features_only=True, **options).eval()
    images = torch.randn(1, 3, *[options.get("img_size", 160)] * 2)
    before, text = model(images), str(model)
    edge_ibtm.insert_mergers(model, merger="tome", keep_ratio=0.6, density=density)
    assert sites_of(model)
    after = model(images)
    assert [f.shape for f in after] == [f.shape for f in before]
    assert not torch.allclose(after[-1], before[-1], atol=1e-6)
    edge_ibtm.remove_mergers(model)
    assert str(model) == text and all(torch.equal(a, b) for a, b in zip(model(images), before))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilevit_xxs", "efficientvit_b0"])
def test_features_of_a_map_merged_once_are_copies(name: str) -> None:
    """At the site's resolution, places that merged have equal features, and they are those of the merged map."""
    model, images = edge_ibtm.build_model(name), torch.randn(1, 3, 192, 192)
    edge_ibtm.insert_mergers(model, merger="tome", keep_ratio=0.6, density="once")
    (trace,) = edge_ibtm.merge_trace(model, images)
    index, patch = int(trace.path.split(".")[1]), 2 if name.startswith("mobile") else 1
    x = model.stem(images)
    for stage in list(model.stages.children())[: index + 1]:
        x = stage(x)
    features = model.forward_intermediates(images, intermediates_only=True)
    shift = len(features) - len(list(model.stages.children()))
    got = features[index + shift]
    side = int(trace.assignment.shape[2] ** 0.5) * patch
    assert got.shape[-2:] == (side, side) and x.shape[-1] < side
    merged = nn.functional.unfold(x, patch, stride=patch)
    assert torch.allclose(nn.functional.unfold(got, patch, stride=patch), merged @ trace.assignment[0], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("family", "density", "macs"), BUDGETS)
def test_a_budget_of_macs_is_met_from_below(family: str, density: str, macs: float) -> None:
    model, side = BACKBONES[family].twin()
    base = edge_ibtm.count_macs(model, side)
    edge_ibtm.insert_mergers(model, merger="tome", macs=macs, img_size=side, density=density)
    assert macs - 0.15 < edge_ibtm.count_macs(model, side) / base <= macs  # a 4 x 4 grid moves in large steps
    steps = schedule(model, side)
    assert [s.path for s in steps] == list(sites_of(model))
    assert all(s.kept <= s.entering for s in steps) and any(s.kept < s.entering for s in steps)
    ratios, kept = [s.keep_ratio for s in steps], [s.kept for s in steps]
    edge_ibtm.insert_mergers(model, merger="tome", keep_ratio=ratios, density=density)
    assert [s.kept for s in schedule(model, side)] == kept


@torch.no_grad()
def test_a_budget_out_of_reach_is_refused() -> None:
    model, side = BACKBONES["vit"].twin()
    with pytest.raises(UsageError, match="cannot be met"):
        edge_ibtm.insert_mergers(model, macs=0.1, img_size=side)
    assert not sites_of(model)
    with pytest.raises(UsageError, match="outside"):
        edge_ibtm.insert_mergers(model, macs=1.5)


@torch.no_grad()
def test_a_pruner_after_a_merger() -> None:
    vit, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    edge_ibtm.insert_mergers(vit, merger="tome+evit", keep_ratio=0.6)
    (trace,) = edge_ibtm.merge_trace(vit, images)
    assert trace.assignment.shape[1:] == (1 + 38, 65)
    edge_ibtm.insert_mergers(vit, merger="tome+drop", keep_ratio=0.6)
    (trace,) = edge_ibtm.merge_trace(vit, images)
    columns = trace.assignment.sum(1)
    assert set(columns.unique().tolist()) == {0.0, 1.0} and (trace.assignment.sum(2) >= 1).all()


@torch.no_grad()
def test_evit_keeps_what_the_class_token_attends_to() -> None:
    vit, images = tiny_vit(depth=1), torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []
    attn = vit.blocks[0].attn
    attn.fused_attn = False
    handle = attn.attn_drop.register_forward_hook(lambda _m, _i, out: seen.append(out))
    vit(images)
    handle.remove()
    best = seen[0][:, :, 0, 1:].mean(1).topk(31).indices + 1
    edge_ibtm.insert_mergers(vit, merger="evit", keep_ratio=0.5)
    (trace,) = edge_ibtm.merge_trace(vit, images)
    fused = trace.assignment[:, -1]
    for image in range(2):
        assert sorted(best[image].tolist()) == sorted((fused[image] == 0).nonzero()[1:, 0].tolist())


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 160), (112, 112), (160, 96)])
@pytest.mark.parametrize("name", ["mobilevit_xxs", "efficientvit_b0"])
def test_odd_and_oblong_images(name: str, size: tuple[int, int]) -> None:
    model = edge_ibtm.build_model(name, num_classes=5)
    images = torch.randn(1, 3, *size)
    for density in BACKBONES[name.split("_")[0]].densities:
        edge_ibtm.insert_mergers(model, merger="tome", density=density)
        assert model(images).shape == (1, 5)
    assert torch.isfinite(model(images)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, "outside"),
        ({"keep_ratio": 1.2}, "outside"),
        ({"keep_ratio": 0.1}, "at least 0.25"),
        ({"keep_ratio": [0.7, 0.2, 0.7]}, "keep ratio 0.2 cannot be met by a grid"),
        ({"keep_ratio": "0.7"}, "keep ratio '0.7' is a str; give a number"),
        ({"keep_ratio": [0.7, 0.7]}, "2 keep ratios for 3 sites"),
        ({"merger": "tomee"}, "did you mean 'tome'"),
        ({"merger": "evit"}, "no meaning in the grid layout; these have"),
        ({"merger": "tome+tofu+evit"}, "chains 3"),
        ({"layout": "gird"}, "did you mean 'grid'"),
        ({"density": "everywhere"}, "known: block, once, progressive, stage"),
        ({"density": "once", "layout": "sequence"}, "needs layout='grid'"),
    ],
)
def test_refusals_leave_the_model_as_it_was(options: dict[str, object], message: str) -> None:
    model = timm.create_model("mobilevit_xxs", num_classes=5).eval()
    keys = list(model.state_dict())
    with pytest.raises(UsageError, match=message):
        edge_ibtm.insert_mergers(model, **options)  # type: ignore[arg-type]
    assert list(model.state_dict()) == keys


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", *(pytest.param(f, marks=pytest.mark.slow) for f in BACKBONES if f != "vit")])
def test_a_batch_of_any_size_exports(family: str) -> None:
    model, side = BACKBONES[family].twin()
    edge_ibtm.insert_mergers(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, side, side),), dynamic_shapes=({0: batch},))
    images = torch.randn(5, 3, side, side)
    assert torch.allclose(program.module()(images), model(images), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("merger", ["ibtm", "ltmp", "tofu"])
def test_half_precision_runs(family: str, merger: str) -> None:
    model, side = BACKBONES[family].twin()
    edge_ibtm.insert_mergers(model, merger=merger).to(torch.bfloat16)
    output = model(torch.randn(1, 3, side, side, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16 and torch.isfinite(output).all()


def test_models_without_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="no tokens that can be merged"):
        edge_ibtm.insert_mergers(timm.create_model("test_resnet" if timm.is_model("test_resnet") else "resnet10t"))
    with pytest.raises(UsageError, match="did you mean 'mobilevit_s'"):
        edge_ibtm.build_model("mobilevit_z")
    with pytest.raises(UsageError, match="no merge sites"):
        edge_ibtm.merge_trace(tiny_vit(), torch.zeros(1, 3, 32, 32))


def test_every_listed_model_is_known_to_timm() -> None:
    assert [name for name in model_names() if not timm.is_model(name)] == []


def test_training_mode_and_parameters_survive() -> None:
    model = tiny_vit(drop_path_rate=0.2).train()
    before = copy.deepcopy(model.state_dict())
    edge_ibtm.insert_mergers(model)
    assert all(m.training for m in model.modules())
    edge_ibtm.remove_mergers(model)
    assert isinstance(model.blocks, nn.Sequential) and model.blocks[1].drop_path1.drop_prob > 0
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and len(before) == len(model.state_dict())


@torch.no_grad()
def test_ibtm_keeps_even_runs_where_convolutions_follow_on_the_merged_map() -> None:
    model, side = BACKBONES["efficientvit"].twin()
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    traces = {}
    for merger in ("ibtm", "uniform"):
        merged = edge_ibtm.insert_mergers(copy.deepcopy(model), merger=merger, keep_ratio=0.5, density="once")
        for step in (m for m in merged.modules() if isinstance(m, IBStep)):
            step.centroids.copy_(torch.nn.functional.normalize(torch.randn_like(step.centroids), dim=-1))
            step.step.normal_()
        (traces[merger],) = edge_ibtm.merge_trace(merged, images)
    assert torch.equal(traces["ibtm"].assignment, traces["uniform"].assignment)
    weights = traces["ibtm"].weights
    assert not torch.allclose(weights, weights[:, :1].expand_as(weights))

"""What is particular to one family of backbones: what its masks read, how its blocks use merged tokens."""

from __future__ import annotations

import re

import pytest
import timm
import torch

import edge_ibtm
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.backbones.mobilevit import MergedMobileVitBlock
from edge_ibtm.errors import UsageError
from edge_ibtm.mergers import IBStep
from edge_ibtm.surgery import sites_of


@torch.no_grad()
def test_mobilevit_masks_read_the_mean_pixel_of_each_patch() -> None:
    model, side = BACKBONES["mobilevit"].twin()
    edge_ibtm.insert_mergers(model, merger="ibtm")
    widths = [block.conv_1x1.out_channels for block in model.modules() if isinstance(block, MergedMobileVitBlock)]
    steps = [m for m in model.modules() if isinstance(m, IBStep)]
    assert [step.centroids.shape[1] for step in steps] == widths
    seen: list[torch.Tensor] = []
    steps[0].norm.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    local: list[torch.Tensor] = []
    first = next(m for m in model.modules() if isinstance(m, MergedMobileVitBlock))
    first.conv_1x1.register_forward_hook(lambda _m, _i, out: local.append(out))
    model(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)))
    mean = torch.nn.functional.avg_pool2d(local[0], 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen[0], mean)


@pytest.mark.parametrize("keep_ratio", [0.7, 0.4])
def test_a_swin_block_changes_merged_tokens_and_copies_them_back(keep_ratio: float) -> None:
    """In lines where rows merge alone (0.7), as a whole map where columns merge too (0.4); a path drops whole images."""
    model, _ = BACKBONES["swin"].twin()
    edge_ibtm.insert_mergers(model, merger="tome", keep_ratio=keep_ratio)
    stage = model.layers[0].blocks
    block = stage.blocks()[1]
    torch.manual_seed(0)
    x = torch.randn(3, 14, 14, 16)
    with torch.no_grad():
        x, merged = stage.step(0, stage.blocks()[0], x, None)
        before = x + block._attn(block.norm1(x))
        z = before.reshape(3, -1, 16)
        wanted = before + merged.copy(block.mlp(block.norm2(merged.pool(z)))).reshape(before.shape)
        assert (merged.plan.columns is None) == (keep_ratio == 0.7)
        torch.testing.assert_close(stage.step(1, block, x, merged)[0], wanted)
        block.drop_path2 = timm.layers.DropPath(0.5, scale_by_keep=False).train()
        torch.manual_seed(4)
        dropped = stage.step(1, block, x, merged)[0]
    whole = [torch.allclose(a, b, atol=1e-5) for a, b in zip(dropped, wanted)]
    assert 0 < sum(whole) < 3
    assert all(kept or torch.equal(a, b) for kept, a, b in zip(whole, dropped, before))


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("num_classes", v) for v in (0, -3, 2.5, None)), *(("img_size", v) for v in (0, -64, (64, 64), True))],
)
def test_a_model_without_classes_or_pixels_is_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{name} is {value}; give at least 1, a whole number")):
        edge_ibtm.build_model("mobilevit_xxs", **{name: value})  # type: ignore[arg-type]


def test_a_model_without_a_name_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown model None; known: "):
        edge_ibtm.build_model(None)  # type: ignore[arg-type]


def test_the_first_of_four_swin_stages_has_a_site_only_where_every_block_has_one() -> None:
    options = {"img_size": 56, "window_size": 7, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **options)
    edge_ibtm.insert_mergers(model)
    assert [name.split(".")[1] for name in sites_of(model)] == ["1", "2", "3"]
    edge_ibtm.insert_mergers(model, density="block")
    assert [name.split(".")[1] for name in sites_of(model)] == ["0", "1", "2", "3"]

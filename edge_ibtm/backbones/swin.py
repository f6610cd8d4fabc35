"""Swin: sites between window attention and MLP; restored after the MLP, so windows, shifts and patch merging are untouched.

A restored token keeps its own features and gets its merged token's update: z + copy(MLP(merged)).
"""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from ..errors import UsageError
from ..mergers import Tokens
from ..site import Merged, Site, ones
from .common import Family, RestoringBlocks, Settings, SiteMaker, no_attention

MODELS = tuple(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base"))
WINDOW = 7


class MergedSwinBlocks(RestoringBlocks):
    """A stage's blocks with sites: grid layout merges rows and columns of window length, sequence layout whole windows."""

    def step(self, index: int, block: nn.Module, x: Tensor, merged: Merged | None) -> tuple[Tensor, Merged | None]:
        """One block on x [B, H, W, C]; a block without a site of its own reuses the plan of the last one."""
        b: Any = block
        x = x + b.drop_path1(b._attn(b.norm1(x)))
        shape, site = x.shape, self.site(index)
        windows = self._windows(x, b.window_size)
        z = windows.reshape(windows.shape[0], -1, shape[-1])
        if site is not None:
            logits = merged.logits if merged is not None else None
            size = ones(z)
            merged = site(Tokens(z, size, z, logits=logits), tuple(windows.shape[1:3]), turned=True)
        assert merged is not None
        pooled = merged.pool(z) if site is None else merged.x

        def change(tokens: Tensor) -> Tensor:
            update = b.mlp(b.norm2(tokens))
            return b.drop_path2(update.reshape(shape[0], -1, shape[-1])).reshape(tokens.shape)  # a path is an image's

        x = windows + merged.copied(pooled, change).reshape(windows.shape)
        if windows.shape[1:] != shape[1:]:
            x = window_reverse(x, b.window_size, shape[1], shape[2])
        return x, merged

    def _windows(self, x: Tensor, window: tuple[int, int]) -> Tensor:
        """What merges among itself: the whole map in grid layout, windows [B * nW, 7, 7, C] in sequence layout."""
        if next(iter(self.sites.values())).layout == "grid":  # type: ignore[attr-defined]
            return x
        if x.shape[1] % window[0] or x.shape[2] % window[1]:
            raise UsageError(
                f"the sequence layout merges whole windows: a {x.shape[1]} x {x.shape[2]} map is not a multiple of "
                f"{window[0]} x {window[1]}; use layout='grid'"
            )
        return window_partition(x, window)


def insert(model: nn.Module, settings: Settings) -> None:
    """Put sites into the Swin stages found in `model`.

    Density "stage" leaves the first of three or more alone: a site there brings less than half of what its MACs promise
    (docs/LOG.md, 2026-11-30).
    """
    stages: list[Any] = [m for m in model.modules() if isinstance(m, SwinTransformerStage)]
    if settings.density == "stage" and len(stages) > 2:
        stages = stages[1:]
    chosen = [range(len(s.blocks)) if settings.density == "block" else range(1) for s in stages]
    maker = SiteMaker(settings, sum(len(c) for c in chosen))
    for stage, indices in zip(stages, chosen):
        sites: dict[int, Site] = {i: maker(stage.blocks[i].dim, WINDOW, rows_alone=True) for i in indices}
        stage.blocks = MergedSwinBlocks(stage.blocks, sites)


def remove(model: nn.Module) -> None:
    """Take the sites out again."""
    for stage in [m for m in model.modules() if isinstance(m, SwinTransformerStage)]:
        if isinstance(stage.blocks, MergedSwinBlocks):
            stage.blocks = stage.blocks.restored()


def twin() -> tuple[nn.Module, int]:
    """A tiny Swin with shifted 7 x 7 windows."""
    model = SwinTransformer(
        img_size=56, patch_size=4, window_size=7, embed_dim=16, depths=(2, 1), num_heads=(2, 2), num_classes=5
    )
    return model.eval(), 56


SWIN = Family(
    name="swin",
    models=MODELS,
    layouts=("grid", "sequence"),
    densities=("stage", "block"),
    handles=lambda model: any(isinstance(m, SwinTransformerBlock) for m in model.modules()),
    insert=insert,
    remove=remove,
    attention=no_attention,
    twin=twin,
)

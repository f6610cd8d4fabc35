"""EfficientViT (MIT): sites between the LiteMLA context module and the MBConv local module; the MBConv runs on H' x W'.

A restored token keeps its own features and gets its merged token's update: z + copy(MBConv(merged)). With density "once"
the map itself is merged before the first attention block and nothing is restored.
"""

from __future__ import annotations

from typing import Any

from timm.models.efficientvit_mit import EfficientVit, EfficientVitBlock, EfficientVitStage
from torch import Tensor, nn

from ..mergers import Tokens
from ..site import Merged, Site, ones
from .common import Family, RestoringBlocks, Settings, SiteMaker, no_attention, to_map, to_tokens
from .once import forget_features, restore_features

MODELS = tuple(f"efficientvit_b{n}" for n in range(4))


class MergedEfficientVitBlocks(RestoringBlocks):
    """A stage's blocks with sites; `once`: the site merges the map in front of its block instead."""

    patch_size = (1, 1)

    def __init__(self, blocks: nn.Sequential, sites: dict[int, Site], once: bool) -> None:
        super().__init__(blocks, sites)
        self.once = once

    def taken_apart(self, blocks: nn.Sequential, sites: dict[int, Site]) -> list[nn.Module]:
        locals_ = [block.local_module for block in blocks if isinstance(block, EfficientVitBlock)]
        return super().taken_apart(blocks, sites) + locals_

    def step(self, index: int, block: nn.Module, x: Tensor, merged: Merged | None) -> tuple[Tensor, Merged | None]:
        """One block on x [B, C, H, W]; an attention block without a site reuses the plan of the last one."""
        site, b = self.site(index), block
        if self.once and site is not None:
            front = _merge(site, to_tokens(x), x.shape[2:], None)
            return b(to_map(front.x, front.grid)), None  # type: ignore[arg-type]
        if self.once or not isinstance(block, EfficientVitBlock):
            return b(x), merged
        x = block.context_module(x)
        z, grid = to_tokens(x), tuple(x.shape[2:])
        if site is not None:
            merged = _merge(site, z, grid, merged)
        assert merged is not None and merged.grid is not None
        pooled = to_map(merged.x if site is not None else merged.pool(z), merged.grid)
        local: Any = block.local_module
        update = merged.copy(to_tokens(local.main(local.pre_norm(pooled))))
        return x + to_map(update, grid), merged  # type: ignore[arg-type]


def _merge(site: Site, z: Tensor, grid: Any, before: Merged | None) -> Merged:
    logits = before.logits if before is not None else None
    return site(Tokens(z, ones(z), z, logits=logits), (int(grid[0]), int(grid[1])))


def _attention_blocks(stage: Any) -> list[int]:
    return [i for i, block in enumerate(stage.blocks) if isinstance(block, EfficientVitBlock)]


def insert(model: nn.Module, settings: Settings) -> None:
    """Put sites into every EfficientViT stage with attention found in `model`."""
    stages: list[Any] = [m for m in model.modules() if isinstance(m, EfficientVitStage) and _attention_blocks(m)]
    once = settings.density == "once"
    chosen = [_attention_blocks(s) if settings.density == "block" else _attention_blocks(s)[:1] for s in stages]
    if once:
        chosen = chosen[:1]
    maker = SiteMaker(settings, sum(len(c) for c in chosen))
    for stage, indices in zip(stages, chosen):
        width = stage.blocks[indices[0]].local_module.main.inverted_conv.conv.in_channels
        sites = {i: maker(width, strided=once) for i in indices}
        stage.blocks = MergedEfficientVitBlocks(stage.blocks, sites, once)
    if once:
        restore_features(model)


def remove(model: nn.Module) -> None:
    """Take the sites out again."""
    for stage in [m for m in model.modules() if isinstance(m, EfficientVitStage)]:
        if isinstance(stage.blocks, MergedEfficientVitBlocks):
            stage.blocks = stage.blocks.restored()
    forget_features(model)


def twin() -> tuple[nn.Module, int]:
    """A tiny EfficientViT with two attention stages of 6 x 6 and 3 x 3 tokens."""
    model = EfficientVit(
        widths=(8, 16, 16, 32, 32), depths=(1, 1, 1, 2, 1), head_dim=16, head_widths=(64, 64), num_classes=5
    )
    return model.eval(), 96


EFFICIENTVIT = Family(
    name="efficientvit",
    models=MODELS,
    layouts=("grid",),
    densities=("once", "stage", "block"),
    handles=lambda model: any(isinstance(m, EfficientVitBlock) for m in model.modules()),
    insert=insert,
    remove=remove,
    attention=no_attention,
    twin=twin,
)

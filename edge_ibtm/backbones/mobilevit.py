"""MobileViT: tokens are merged at the entry of each MobileViT block (density "stage"), between attention and MLP of every
layer ("block"), of the first two layers for good ("progressive"), or in the map before the first block ("once").

A token here is a whole 2 x 2 patch (4 C features): its four pixels merge together, so the fold still works, and matching is
done once instead of four times; IBTM's mask reads their mean, a quarter of the features and of the centroids. Merged at
the entry or progressively, tokens stay merged for the block's later layers; a restored token keeps its own features and
gets its merged token's update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.byobnet import ByobNet
from timm.models.mobilevit import MobileVitBlock, _inverted_residual_block, _mobilevit_block, model_cfgs
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..mergers import Tokens
from ..site import Merged, Site, ones
from ..tokens import group_mean
from .common import Family, Settings, SiteMaker, check_hooks, no_attention, replace_modules
from .once import forget_features, restore_features
from .vit import attention_half, mlp_half, size_bias, spread

MODELS = tuple(f"mobilevit_{size}" for size in ("xxs", "xs", "s"))


class MergedMobileVitBlock(nn.Module):
    """timm's MobileVitBlock, its children under their own names, with one site at the entry or one in every layer."""

    def __init__(self, block: MobileVitBlock, sites: list[Site], density: str) -> None:
        super().__init__()
        check_hooks(block, *(block.transformer if density in ("block", "progressive") else ()))
        for name, child in block.named_children():
            self.add_module(name, child)
        self.patch_size, self.patch_area, self.density = block.patch_size, block.patch_area, density
        self.conv_fusion = block.conv_fusion
        self.sites, self.training = nn.ModuleList(sites), block.training
        self.centre = nn.Identity()  # what goes into the layers behind an entry's site; they ignore its mean

    def restored(self) -> MobileVitBlock:
        """The block as timm builds it, with the same children."""
        block = MobileVitBlock.__new__(MobileVitBlock)
        nn.Module.__init__(block)
        for name, child in self.named_children():
            if name not in ("sites", "centre"):
                block.add_module(name, child)
        block.patch_size, block.patch_area, block.conv_fusion = self.patch_size, self.patch_area, self.conv_fusion
        block.training = self.training
        return block

    def forward(self, x: Tensor) -> Tensor:
        """A map [B, C, H, W] through the block: the same shape, or H' x W' with density "once"."""
        if self.density == "once":
            x = self._merge_map(x)
        y = self.between(self.conv_kxk(x))  # type: ignore[operator]
        return y if self.conv_fusion is None else self.conv_fusion(torch.cat((x, y), dim=1))

    def between(self, local: Tensor) -> Tensor:
        """What is between the 3 x 3 convolutions, on a map [B, C, H, W]."""
        local = self.conv_1x1(local)  # type: ignore[operator]
        size, (ph, pw) = local.shape[2:], self.patch_size
        grid = math.ceil(size[0] / ph), math.ceil(size[1] / pw)
        even = (grid[0] * ph, grid[1] * pw)
        if even != tuple(size):
            local = F.interpolate(local, size=even, mode="bilinear", align_corners=False)
        y = self._fold(self._global(self._unfold(local, grid), grid), grid)
        if even != tuple(size):
            y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
        return self.conv_proj(y)  # type: ignore[no-any-return, operator]

    def _unfold(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, C, H, W] -> patch tokens [B, N, area * C]."""
        (ph, pw), (batch, channels, *_) = self.patch_size, x.shape
        x = x.permute(0, 2, 3, 1).reshape(batch * grid[0], ph, grid[1], pw, channels)
        return x.permute(0, 2, 1, 3, 4).reshape(batch, grid[0] * grid[1], self.patch_area * channels)

    def _fold(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens [B, N, area * C] -> [B, C, H, W]."""
        (ph, pw), batch = self.patch_size, tokens.shape[0]
        x = tokens.reshape(batch * grid[0], grid[1], ph, pw, -1).permute(0, 2, 1, 3, 4)
        return x.reshape(batch, grid[0] * ph, grid[1] * pw, -1).permute(0, 3, 1, 2)

    def _pixels(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, N, area * C] -> timm's sequences, one a pixel of the patch: [B * area, N, C]."""
        batch, count, width = tokens.shape
        x = tokens.reshape(batch, count, self.patch_area, width // self.patch_area).transpose(1, 2)
        return x.reshape(batch * self.patch_area, count, width // self.patch_area)

    def _patches(self, pixels: Tensor) -> Tensor:
        """The inverse of `_pixels`."""
        lines, count, channels = pixels.shape
        x = pixels.reshape(lines // self.patch_area, self.patch_area, count, channels).transpose(1, 2)
        return x.reshape(lines // self.patch_area, count, self.patch_area * channels)

    def _site(self, index: int, z: Tensor, grid: tuple[int, int], before: Merged | None = None) -> Merged:
        logits = before.logits if before is not None else None
        return self.sites[index](self._tokens(z, ones(z), logits), grid, turned=self.density != "once")

    def _tokens(self, z: Tensor, size: Tensor, logits: Tensor | None) -> Tokens:
        """Patch tokens [B, N, area * C]; a mask reads the mean [B, N, C] of their pixels."""

        def summary() -> Tensor:
            batch, count, width = z.shape
            return group_mean(z.reshape(batch, count, self.patch_area, width // self.patch_area))

        return Tokens(z, size, z, logits=logits, summary=summary)

    def _global(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """The transformer layers and the norm, on patch tokens [B, N, area * C]."""
        transformer: Any = self.transformer
        if self.density == "block":
            return self._patches(self.norm(self._layers(z, grid)))  # type: ignore[operator]
        if self.density == "once":
            return self._patches(self.norm(transformer(self._pixels(z))))  # type: ignore[operator]
        if self.density == "progressive":
            return self.norm(self._each(self._progressive(z, grid))).reshape(z.shape)  # type: ignore[operator]
        merged = self._site(0, z, grid)
        proportional = bool(self.sites[0].merger.proportional) and merged.plan is not None  # type: ignore[union-attr]
        bias = size_bias(merged.size, self.patch_area) if proportional else None
        x = self.centre(self._pixels(merged.x))
        y = x
        for layer in transformer:
            y = layer(y, attn_mask=bias)
        if merged.plan is None:
            return self._patches(self.norm(y))  # type: ignore[operator]
        update = merged.copy(self._patches(y - x))
        return self.norm(self._each(z) + self._each(update)).reshape(z.shape)  # type: ignore[operator]

    def _each(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, N, area * C] as maps of their pixels [B * N, area, 1, C], whose mean is a pooling."""
        batch, count, width = tokens.shape
        return tokens.reshape(batch * count, self.patch_area, 1, width // self.patch_area)

    def _progressive(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """The first layers merge a bit each for their MLP and all that follows; -> patch tokens, restored step by step."""
        x, bias = self._pixels(z), None
        size, logits = ones(z), None
        steps: list[tuple[Tensor, Merged]] = []
        for index, layer in enumerate(self.transformer):  # type: ignore[arg-type]
            x = attention_half(layer, x, bias)
            if index < len(self.sites):
                before = self._patches(x)
                merged = self.sites[index](self._tokens(before, size, logits), grid)
                size, logits, grid = merged.size, merged.merged_logits, merged.grid
                if merged.plan is not None:
                    steps.append((before, merged))
                    x = self._pixels(merged.x)
                    bias = size_bias(size, self.patch_area) if self.sites[index].merger.proportional else None  # type: ignore[union-attr]
            x = mlp_half(layer, x)
        y = self._patches(x)
        for before, merged in reversed(steps):
            y = before + merged.copy(y - merged.x)
        return y

    def _layers(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """Every layer attends to all tokens and merges for its MLP; -> pixel sequences."""
        x, merged = self._pixels(z), None
        for index, layer in enumerate(self.transformer):  # type: ignore[arg-type]
            x = attention_half(layer, x, None)
            merged = self._site(index, self._patches(x), grid, merged)
            if merged.plan is None:
                x = mlp_half(layer, x)
                continue
            pooled = self._pixels(merged.x)
            update = self._patches(mlp_half(layer, pooled) - pooled)
            x = x + self._pixels(merged.copy(update))
        return x

    def _merge_map(self, x: Tensor) -> Tensor:
        """Merge the map in units of patches, for good: [B, C, H, W] -> [B, C, H', W']."""
        (ph, pw), size = self.patch_size, x.shape[2:]
        if size[0] % ph or size[1] % pw:
            return x
        grid = size[0] // ph, size[1] // pw
        merged = self._site(0, self._unfold(x, grid), grid)
        return self._fold(merged.x, merged.grid)  # type: ignore[arg-type]


def insert(model: nn.Module, settings: Settings) -> None:
    """Put sites into every MobileViT block found in `model`; with density "once" into the first only.

    With density "progressive" the first two layers of each block have one, and a single keep ratio is what is left after
    the second.
    """
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, MobileVitBlock)]
    counts = {
        "stage": [1] * len(blocks), "once": [1] + [0] * (len(blocks) - 1), "block": [len(b.transformer) for b in blocks],
        "progressive": [min(2, len(b.transformer)) for b in blocks],
    }  # fmt: skip
    counted = counts[settings.density]
    if settings.density == "progressive" and not isinstance(settings.keep_ratio, Sequence):
        ratios = [r for count in counted for r in spread(settings.keep_ratio, count)]
        settings = replace(settings, keep_ratio=ratios)
    maker = SiteMaker(settings, sum(counted))
    made = iter(counted)

    def change(block: MobileVitBlock) -> nn.Module:
        count = next(made)
        if not count:
            return block
        once = settings.density == "once"
        inner: Any = block.conv_kxk.conv.in_channels if once else block.conv_1x1.out_channels  # type: ignore[union-attr]
        restored = settings.density in ("stage", "block")
        sites = [maker(inner, rows_alone=restored, strided=once) for _ in range(count)]
        return MergedMobileVitBlock(block, sites, settings.density)

    replace_modules(model, MobileVitBlock, change)
    if settings.density == "once":
        restore_features(model)


def remove(model: nn.Module) -> None:
    """Take the sites out again."""
    replace_modules(model, MergedMobileVitBlock, lambda merged: merged.restored())
    forget_features(model)


def twin() -> tuple[nn.Module, int]:
    """A tiny MobileViT: a block of three layers on 4 x 4 patches, one of a single layer on 2 x 2."""
    blocks = (
        _inverted_residual_block(d=1, c=8, s=1, br=2.0),
        _mobilevit_block(d=1, c=16, s=2, transformer_dim=32, transformer_depth=3, patch_size=2, br=2.0),
        _mobilevit_block(d=1, c=16, s=2, transformer_dim=24, transformer_depth=1, patch_size=2, br=2.0),
    )
    cfg = replace(model_cfgs["mobilevit_xxs"], blocks=blocks, stem_chs=8, num_features=32)
    return ByobNet(cfg, num_classes=5).eval(), 32


MOBILEVIT = Family(
    name="mobilevit",
    models=MODELS,
    layouts=("grid", "sequence"),
    densities=("stage", "block", "once", "progressive"),
    handles=lambda model: any(
        isinstance(m, MobileVitBlock) and all(isinstance(b, Block) for b in m.transformer) for m in model.modules()
    ),
    insert=insert,
    remove=remove,
    attention=no_attention,
    twin=twin,
)

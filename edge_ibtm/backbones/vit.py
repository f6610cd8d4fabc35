"""ViT, DeiT, DINOv2: sites between attention and MLP; merged tokens persist to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..errors import UsageError
from ..mergers import Tokens
from ..site import Merged, Site, ones
from ..tokens import group_mean
from .common import Family, MergedBlocks, Settings, SiteMaker, captured, handing_on, replace_modules

MODELS = (
    *(f"vit_{size}_patch16_{pixels}" for size in ("tiny", "small", "base") for pixels in (224, 384)),
    *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")),
    *(f"deit3_{size}_patch16_224" for size in ("small", "base")),
    *(f"vit_{size}_patch14_{kind}dinov2" for size in ("small", "base") for kind in ("", "reg4_")),
)


def attention_half(block: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """A timm block up to and including its attention residual."""
    b: Any = block
    if isinstance(block, ResPostBlock):
        return x + b.drop_path1(b.norm1(b.attn(x, attn_mask=bias)))
    return x + b.drop_path1(b.ls1(b.attn(b.norm1(x), attn_mask=bias)))


def mlp_half(block: nn.Module, x: Tensor) -> Tensor:
    """A timm block after its attention residual."""
    b: Any = block
    if isinstance(block, ResPostBlock):
        return x + b.drop_path2(b.norm2(b.mlp(x)))
    return x + b.drop_path2(b.ls2(b.mlp(b.norm2(x))))


def size_bias(size: Tensor, copies: int = 1) -> Tensor:
    """Proportional attention (ToMe, eq. 1): log sizes [B, N] as timm's attn_mask [B * copies, 1, 1, N]."""
    batch, tokens = size.shape
    bias = torch.log(size).reshape(batch, 1, 1, tokens)
    if copies == 1 or batch == 1:
        return bias
    return bias.expand(batch, copies, 1, tokens).reshape(batch * copies, 1, 1, tokens)


@dataclass(frozen=True)
class Carry:
    """What passes from block to block: tokens [B, P, D], their sizes, IBTM's logits, and how to copy them back.

    bias: proportional attention [B, 1, 1, P], None where nothing has merged or the method has no use for it.
    """

    x: Tensor
    size: Tensor | None = None
    logits: Tensor | None = None
    sites: tuple[Merged, ...] = ()
    bias: Tensor | None = None

    def unmerged(self) -> Tensor:
        """The tokens copied back to all places they came from: [B, N, D]."""
        x = self.x
        for merged in reversed(self.sites):
            x = merged.copy(x)
        return x


class MergedViTBlocks(MergedBlocks):
    """ViT's blocks with sites. prefix: class, distillation and register tokens; restore: copy back after the last block.

    embed: the model's PatchEmbed, which knows the grid also after timm's set_input_size.
    """

    def __init__(self, blocks: nn.Sequential, sites: dict[int, Site], prefix: int, embed: Any, restore: bool) -> None:
        super().__init__(blocks, sites)
        self.prefix, self.restore = prefix, restore
        self.embed = (embed,)  # in a tuple it is no child

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.embed[0].grid_size
        return height, width

    def forward(self, x: Tensor) -> Tensor:
        carry = Carry(x)
        for index, block in enumerate(self.blocks()):
            carry = self.step(index, block, carry)
        return carry.unmerged() if self.restore else carry.x

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Callables that give unmerged tokens, so that timm's forward_intermediates sees the original grid."""

        def step(index: int, block: nn.Module, x: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
            carry = self.step(index, block, Carry(x) if carry is None else carry)
            return carry.unmerged(), carry

        return handing_on(partial(step, index, block) for index, block in enumerate(self.blocks()))

    def step(self, index: int, block: nn.Module, carry: Carry) -> Carry:
        """One block, with its site if it has one."""
        bias, site = carry.bias, self.site(index)
        if site is None:
            return replace(carry, x=block(carry.x, attn_mask=bias))
        attn: Any = block.attn
        with ExitStack() as stack:
            q, k, qkv = (stack.enter_context(captured(m)) for m in (attn.q_norm, attn.k_norm, attn.qkv))
            x = attention_half(block, carry.x, bias)
        seen = SeenAttention(attn, q[0], k[0], qkv[0], bias)
        size = ones(x) if carry.size is None else carry.size
        tokens = Tokens(
            x, size, head_mean(k[0]), prefix=self.prefix, logits=carry.logits,
            class_attention=seen.of_class, received_attention=seen.received,
        )  # fmt: skip
        merged = site(tokens, self.grid if not carry.sites else carry.sites[-1].grid)
        if merged.plan is None:
            return replace(carry, x=mlp_half(block, x), logits=merged.logits)
        bias = size_bias(merged.size) if site.merger.proportional else None
        return Carry(mlp_half(block, merged.x), merged.size, merged.merged_logits, (*carry.sites, merged), bias)


@dataclass(frozen=True)
class SeenAttention:
    """What an attention module computed: q, k [B, heads, N, d], qkv [B, N, 3 C], and the bias it was given."""

    attn: Any
    q: Tensor
    k: Tensor
    qkv: Tensor
    bias: Tensor | None

    def _weights(self, q: Tensor) -> Tensor:
        logits = (q * self.attn.scale) @ self.k.transpose(-2, -1)
        return torch.softmax(logits if self.bias is None else logits + self.bias, -1)

    def of_class(self) -> tuple[Tensor, Tensor]:
        """Attention of the class token [B, N] and norm of the values [B, N], both averaged over heads."""
        attention = self._weights(self.q[:, :, :1]).mean(1).squeeze(1)
        batch, tokens, _ = self.qkv.shape
        value = self.qkv[..., 2 * self.qkv.shape[-1] // 3 :]
        value = value.reshape(batch, tokens, self.attn.num_heads, -1)
        return attention, torch.sqrt((value * value).sum(-1)).mean(-1)

    def received(self) -> Tensor:
        """Mean attention that each token receives, over heads and queries: [B, N]."""
        return self._weights(self.q).mean(2).mean(1)


def head_mean(k: Tensor) -> Tensor:
    """Keys [B, heads, N, d] averaged over heads [B, N, d]."""
    return group_mean(k.transpose(1, 2))


def site_blocks(depth: int, density: str) -> list[int]:
    """Blocks that have a site: all of them, every quarter but the last, or one early block."""
    if density == "block":
        return list(range(depth))
    if density == "stage":
        return sorted({depth * i // 4 for i in (1, 2, 3)})
    return [depth // 12]


def spread(keep_ratio: float, sites: int) -> list[float]:
    """Ratios of successive sites that each remove the same number of tokens and leave `keep_ratio` of them in the end."""
    left = [1 - (1 - keep_ratio) * i / sites for i in range(sites + 1)]
    return [after / before for before, after in pairwise(left)]


def insert(model: nn.Module, settings: Settings) -> None:
    """Put sites into every VisionTransformer found in `model`."""
    for vit in [m for m in model.modules() if isinstance(m, VisionTransformer)]:
        blocks: Any = vit.blocks
        _check_blocks(blocks)
        if settings.layout == "grid":
            _check_images(vit)
        chosen = site_blocks(len(blocks), settings.density)
        if not isinstance(settings.keep_ratio, (list, tuple)):
            settings = replace(settings, keep_ratio=spread(float(settings.keep_ratio), len(chosen)))  # type: ignore[arg-type]
        maker = SiteMaker(settings, len(chosen))
        sites = {i: maker(vit.embed_dim) for i in chosen}
        for i, site in sites.items():
            site.depth = i / len(blocks)
        restore = vit.global_pool != "token"
        vit.blocks = MergedViTBlocks(blocks, sites, vit.num_prefix_tokens, vit.patch_embed, restore)  # type: ignore[assignment]


def _check_blocks(blocks: nn.Sequential) -> None:
    for block in blocks:
        if type(block) not in (Block, ResPostBlock) or not hasattr(block.attn, "k_norm"):
            raise UsageError(
                f"blocks of class {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__} have no "
                "supported place between attention and MLP; supported: timm's ViT Block and ResPostBlock with Attention"
            )


def _check_images(vit: Any) -> None:
    if vit.dynamic_img_size or not getattr(vit.patch_embed, "strict_img_size", True):
        raise UsageError(
            "layout 'grid' has to know the grid, and this model takes images of any size (dynamic_img_size=True or "
            "strict_img_size=False); use layout='sequence', or build the model without and call set_input_size"
        )


def remove(model: nn.Module) -> None:
    """Take the sites out again."""
    replace_modules(model, MergedViTBlocks, lambda merged: merged.restored())


def attention(model: nn.Module) -> tuple[str, ...]:
    """Every ViT site sees its block's attention; only those with a class token see class attention."""
    vit = next(m for m in model.modules() if isinstance(m, VisionTransformer))
    return ("class_attention", "received_attention") if vit.has_class_token else ("received_attention",)


def twin() -> tuple[nn.Module, int]:
    """A tiny DINOv2-like ViT: class and register tokens, LayerScale, q/k norm."""
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5, reg_tokens=2, init_values=0.5,
        qk_norm=True, class_token=True,
    )  # fmt: skip
    return model.eval(), 32


VIT = Family(
    name="vit",
    models=MODELS,
    layouts=("sequence", "grid"),
    densities=("once", "stage", "block"),
    handles=lambda model: any(isinstance(m, VisionTransformer) for m in model.modules()),
    insert=insert,
    remove=remove,
    attention=attention,
    twin=twin,
)

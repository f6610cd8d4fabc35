"""Cheaper LayerNorms: their scale and shift in the layers that read them, their means in the layers that write to them.

Between a transformer's blocks runs a residual stream that only LayerNorms read, and a LayerNorm does not see its input's
mean. So whatever adds to the stream may give outputs of mean zero (a change of its weights), and the LayerNorms need
not subtract a mean: of seven passes over the features three are left. Source: Ashkboos et al., SliceGPT
(arXiv:2401.15024), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm import layers
from timm.models.mobilevit import MobileVitBlock
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from edge_ibtm.backbones.common import MergedBlocks
from edge_ibtm.backbones.mobilevit import MergedMobileVitBlock
from edge_ibtm.mergers import IBTM
from edge_ibtm.rewrite_attention import never_pads
from edge_ibtm.rewrite_conv import is_pointwise
from edge_ibtm.rewrite_norm import Centred, MeanFreeNorm
from edge_ibtm.site import Site


def lighten_norms(model: nn.Module) -> nn.Module:
    """Lighten the LayerNorms of timm's ViT, Swin and MobileViT blocks, in place; equal up to rounding.

    A ViT's stream loses its means only where the ViT is exported itself: a module around it might ask for features.
    A Swin's keeps them: the norm of PatchMerging joins four tokens and sees how their means differ.
    """
    with torch.no_grad():
        for module in model.modules():
            if _is_plain(module):
                _fold_block(module)
            elif type(module) is PatchMerging and type(module.reduction) is nn.Linear:
                _fold_affine(module.norm, module.reduction)
        for module in list(model.modules()):
            if type(module) in (MobileVitBlock, MergedMobileVitBlock):
                _free_mobilevit(module)
        if type(model) is VisionTransformer:
            _free_vit(model)
    return model


def _is_plain(block: Any) -> bool:
    """Whether a block is a pre-norm block of timm's ViT or Swin with LayerNorms, timm's attention and its MLP."""
    if type(block) not in (Block, SwinTransformerBlock):
        return False
    attention = layers.Attention if type(block) is Block else WindowAttention
    if type(block.attn) is not attention or type(block.mlp) is not layers.Mlp:
        return False
    linear = (block.attn.qkv, block.attn.proj, getattr(block.attn, "gate", None), block.mlp.fc1, block.mlp.fc2)
    return (
        all(type(layer) is nn.Linear for layer in linear if layer is not None)
        and _is_norm(block.norm1) and _is_norm(block.norm2)
    )  # fmt: skip


def _is_norm(norm: nn.Module) -> bool:
    return type(norm) in (nn.LayerNorm, layers.LayerNorm) and len(norm.normalized_shape) == 1  # type: ignore[arg-type]


def _fold_block(block: Any) -> None:
    if type(block) is Block or never_pads(block):  # zeros that pad a map stand behind its norm
        readers = [block.attn.qkv, getattr(block.attn, "gate", None)]
        _fold_affine(block.norm1, *(layer for layer in readers if layer is not None))
    _fold_affine(block.norm2, block.mlp.fc1)
    for scale, layer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
        module = getattr(block, scale, None)
        if type(module) is layers.LayerScale:
            gamma = module.gamma.double()
            _set(layer, layer.weight.double() * gamma[:, None], None if layer.bias is None else layer.bias.double() * gamma)
            setattr(block, scale, nn.Identity())


def _fold_affine(norm: Any, *readers: nn.Linear | nn.Conv2d) -> None:
    """Scale and shift of a LayerNorm into the linear layers, or 1 x 1 convolutions, that alone read it."""
    if not _is_norm(norm) or norm.weight is None:
        return
    for layer in readers:
        weight, bias = layer.weight.double().flatten(1), layer.bias
        if norm.bias is not None:
            bias = weight @ norm.bias.double() + (0 if bias is None else bias.double())
        _set(layer, (weight * norm.weight.double()).reshape(layer.weight.shape), bias)
    norm.weight = norm.bias = None


def _set(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype))
    layer.bias = None if bias is None else nn.Parameter(bias.to(dtype))


def _centre(*writers: nn.Linear | nn.Conv2d) -> None:
    """Give the outputs of layers the mean zero over their features."""
    for layer in writers:
        weight = layer.weight.double()
        bias = None if layer.bias is None else layer.bias.double() - layer.bias.double().mean()
        _set(layer, weight - weight.mean(0, keepdim=True), bias)


def _free_blocks(blocks: Iterable[Any]) -> None:
    for block in blocks:
        _centre(block.attn.proj, block.mlp.fc2)
        block.norm1, block.norm2 = MeanFreeNorm.of(block.norm1), MeanFreeNorm.of(block.norm2)


def _free_sites(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, IBTM):
            module.information.norm = MeanFreeNorm.of(module.information.norm)


def _blocks(blocks: nn.Module) -> list[nn.Module]:
    return blocks.blocks() if isinstance(blocks, MergedBlocks) else list(blocks.children())


def _sites_allow(model: nn.Module) -> bool:
    return all(module.merger.ignores_mean for module in model.modules() if isinstance(module, Site))


def _free_vit(vit: Any) -> None:
    blocks, embed = _blocks(vit.blocks), vit.patch_embed
    plain = all(type(b) is Block and _is_plain(b) for b in blocks) and type(embed.proj) is nn.Conv2d
    if not (plain and _sites_allow(vit) and _is_norm(vit.norm)):
        return
    if not (isinstance(getattr(embed, "norm", None), nn.Identity) and isinstance(vit.norm_pre, nn.Identity)):
        return
    _centre(embed.proj)
    for name in ("cls_token", "reg_token", "pos_embed"):
        if (token := getattr(vit, name, None)) is not None:
            setattr(vit, name, nn.Parameter(token - token.double().mean(-1, keepdim=True).to(token.dtype)))
    _free_blocks(blocks)
    _free_sites(vit)
    vit.norm = MeanFreeNorm.of(vit.norm)


def _free_mobilevit(block: Any) -> None:
    """The transformer's stream; where a site stands before it, whose similarities see the mean, from behind the site on."""
    if is_pointwise(block.conv_proj.conv):
        _fold_affine(block.norm, block.conv_proj.conv)
    if not all(map(_is_plain, block.transformer)) or not _is_norm(block.norm):
        return
    density = getattr(block, "density", "once")
    if density == "stage":
        block.centre = Centred(block.norm.normalized_shape[0])
    elif density == "once" and type(block.conv_1x1) is nn.Conv2d:
        _centre(block.conv_1x1)
        block.norm = MeanFreeNorm.of(block.norm)
    else:
        return
    _free_blocks(block.transformer)

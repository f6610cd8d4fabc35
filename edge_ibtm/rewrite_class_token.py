"""A ViT that reads its class token alone: the last block computes no other token.

The last block's queries, output products and MLP of the other tokens reach no output: on ViT-S that is 10/12 of the block,
7 % of the network's multiplications.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from edge_ibtm.backbones.common import MergedBlocks
from edge_ibtm.rewrite_attention import SplitAttention


class ClassTokenBlock(nn.Module):
    """The equal of timm's Block (its attention rewritten already) on the first token: x [B, N, C] -> [B, 1, C]."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        if is_causal or (attn_mask is not None and attn_mask.shape[-2] != 1):
            raise ValueError("the last block was reduced to its class token, which no mask over queries fits")
        normed = self.norm1(x)
        first = x[:, :1] + self.ls1(self.attn.answer(normed[:, :1], normed, attn_mask))
        return first + self.ls2(self.mlp(self.norm2(first)))


def class_token_only(model: nn.Module) -> nn.Module:
    """Reduce the last block of a timm VisionTransformer whose head reads the class token only; others stay as they are.

    A site of that block goes too: the class token is never merged, and nothing reads the others after it. Only for a
    model that is exported itself: a module around it might ask for all features.
    """
    if type(model) is not VisionTransformer or model.global_pool != "token" or model.attn_pool is not None:
        return model
    blocks: Any = model.blocks
    name, last = [(n, b) for n, b in blocks.named_children() if n != "sites"][-1]
    if not model.has_class_token or type(last) is not Block or type(last.attn) is not SplitAttention:
        return model
    setattr(blocks, name, ClassTokenBlock(last))
    if isinstance(blocks, MergedBlocks) and name in blocks.sites:
        del blocks.sites[name]
    return model

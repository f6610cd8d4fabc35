"""Linear attention of EfficientViT (LiteMLA) and MobileViTv2 with operators that delegates take.

LiteMLA: Cai et al., arXiv 2205.14756, equation 3: out = relu(q) (relu(k)^T v) / (relu(q) sum relu(k)).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edge_ibtm.rewrite_ops import filled_row


class ChannelFirstMLA(nn.Module):
    """The equal of timm's LiteMLA: every product on [channels, positions], no split, no padding with ones.

    x [B, C, H, W] -> [B, C', H, W].
    """

    def __init__(self, mla: Any) -> None:
        super().__init__()
        self.dim, self.eps = mla.dim, mla.eps
        self.qkv, self.aggreg, self.kernel_func, self.proj = mla.qkv, mla.aggreg, mla.kernel_func, mla.proj

    @classmethod
    def of(cls, mla: Any) -> nn.Module:
        return cls(mla)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        qkv = self.qkv(x)
        scales = torch.cat([qkv, *(op(qkv) for op in self.aggreg)], 1)
        groups = scales.reshape(-1, 3 * self.dim, height * width)
        q, k, v = (groups[:, i * self.dim : (i + 1) * self.dim] for i in range(3))
        q, k = self.kernel_func(q), self.kernel_func(k)
        total = F.linear(k, filled_row(1.0, height * width, k)).reshape(-1, 1, self.dim)
        out = torch.bmm(torch.bmm(v, k.transpose(1, 2)), q) / (torch.bmm(total, q) + self.eps)
        return self.proj(out.reshape(batch, -1, height, width))


class SlicedLinearAttention(nn.Module):
    """The equal of MobileViTv2's LinearSelfAttention (arXiv 2206.02680): slices for splits, products for sums.

    x [B, C, P, N] -> [B, C, P, N].
    """

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.embed_dim, self.qkv_proj, self.out_proj = attn.embed_dim, attn.qkv_proj, attn.out_proj

    @classmethod
    def of(cls, attn: Any) -> nn.Module:
        return cls(attn)

    def forward(self, x: torch.Tensor, x_prev: torch.Tensor | None = None) -> torch.Tensor:
        if x_prev is not None:
            raise NotImplementedError("cross attention is not used by MobileViTv2 classifiers")
        dim = self.embed_dim
        qkv = self.qkv_proj(x)
        query, key, value = qkv[:, :1], qkv[:, 1 : 1 + dim], qkv[:, 1 + dim :]
        # Off the map layout first: the delegate would take the softmax over the channels of a map.
        scores = torch.softmax(query.reshape(-1, *x.shape[2:]), -1).reshape(query.shape)
        context = F.linear(key * scores, filled_row(1.0, x.shape[-1], x))
        return self.out_proj(F.relu(value) * context)

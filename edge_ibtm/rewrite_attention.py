"""Softmax attention with separate q, k, v products, the scale folded into q, and plain batched products.

Fused attention decomposes into a tail of masks that no delegate takes; one q/k/v product has to be unbound by copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SplitQKV(nn.Module):
    """Three linear layers in place of timm's one; `forward` joins their outputs for those who hook `attn.qkv`."""

    def __init__(self, qkv: nn.Linear, scale: float) -> None:
        super().__init__()
        self.q, self.k, self.v = cut(qkv, 3)
        with torch.no_grad():
            for parameter in self.q.parameters():
                parameter.mul_(scale)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([q, k, v], -1)


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer that holds the given weight [out, in] and bias [out]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def cut(layer: nn.Linear, count: int) -> list[nn.Linear]:
    """`count` layers that each give an equal part of a layer's outputs."""
    biases = [None] * count if layer.bias is None else [b.clone() for b in layer.bias.detach().chunk(count)]
    return [linear_of(w.clone(), b) for w, b in zip(layer.weight.detach().chunk(count), biases)]


def attend(q: torch.Tensor, k_t: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T + bias) v for q [B, h, N, d], k_t [B, h, d, M] or [B h, d, M], v [B, h, M, d] -> [B, h, N, d].

    bias: broadcast to [B, h, N, M].
    """
    batch, heads, tokens, dim = q.shape
    keys = k_t.shape[-1]
    logits = torch.bmm(q.reshape(-1, tokens, dim), k_t.reshape(-1, dim, keys))
    if bias is not None:
        logits = logits.reshape(batch, heads, tokens, keys) + bias
    weights = torch.softmax(logits, -1).reshape(-1, tokens, keys)
    return torch.bmm(weights, v.reshape(-1, keys, v.shape[-1])).reshape(batch, heads, tokens, -1)


def additive(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """A boolean attention mask as 0 / -inf; an additive one as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, float("-inf"))


class SplitAttention(nn.Module):
    """The equal of timm's Attention in eval mode; `q_norm`, `k_norm` and `qkv` can be hooked as on the original.

    x [B, N, C], attn_mask additive or boolean, broadcast to [B, h, N, N] -> [B, N, C]. `scale` is 1: it is in q.
    With several `sequences` S in turn, x is [B, N S, C], token n of sequence s at n S + s, and the mask that of B S.
    """

    sequences = 1

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = attn.num_heads, attn.head_dim, attn.attn_dim
        plain = isinstance(attn.q_norm, nn.Identity)
        self.scale = 1.0 if plain else attn.scale
        self.qkv = SplitQKV(attn.qkv, attn.scale if plain else 1.0)
        self.q_norm, self.k_norm, self.norm = attn.q_norm, attn.k_norm, attn.norm
        self.gate, self.proj = attn.gate, attn.proj

    @classmethod
    def of(cls, attn: Any) -> nn.Module:
        return cls(attn) if type(attn.qkv) is nn.Linear else attn  # a layer with arithmetic of its own cannot be split

    def _heads(self, x: torch.Tensor, turned: bool = False) -> torch.Tensor:
        """[B, N S, C] -> [B S, h, N, d]; turned: [B S, h, d, N]."""
        (batch, tokens, _), each, several = x.shape, (self.num_heads, self.head_dim), self.sequences
        if several == 1:
            return x.reshape(batch, tokens, *each).permute((0, 2, 3, 1) if turned else (0, 2, 1, 3))
        x = x.reshape(batch, tokens // several, several, *each).permute((0, 2, 3, 4, 1) if turned else (0, 2, 3, 1, 4))
        return x.reshape(batch * several, *x.shape[2:])

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `_heads`."""
        if self.sequences == 1:
            return x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], self.attn_dim)
        x = x.reshape(x.shape[0] // self.sequences, self.sequences, *x.shape[1:]).permute(0, 3, 1, 2, 4)
        return x.reshape(x.shape[0], x.shape[1] * self.sequences, self.attn_dim)

    def forward(self, x: torch.Tensor, attn_mask: Any = None, is_causal: bool = False) -> torch.Tensor:
        return self.answer(x, x, causal_bias(x.shape[1] // self.sequences, x) if is_causal else additive(attn_mask, x))

    def answer(self, asking: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What the queries of `asking` [B, M, C] get from keys and values of x [B, N, C]: [B, M, C]."""
        q, k, v = self.qkv.q(asking), self.qkv.k(x), self.qkv.v(x)
        if asking is x:
            self.qkv(q, k, v)
        queries, keys = self.q_norm(self._heads(q)), self.k_norm(self._heads(k))
        plain = isinstance(self.k_norm, nn.Identity)
        keys_t = self._heads(k, turned=True) if plain else keys.transpose(-2, -1)
        if self.scale != 1.0:
            queries = queries * self.scale
        out = self.norm(self._joined(attend(queries, keys_t, self._heads(v), bias)))
        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(asking))
        return self.proj(out)


def causal_bias(tokens: int, like: torch.Tensor) -> torch.Tensor:
    """[N, N]: -inf above the diagonal."""
    return like.new_full((tokens, tokens), float("-inf")).triu(1)


def never_pads(block: Any) -> bool:
    """Whether a Swin block only sees maps that are a multiple of its windows."""
    return not block.dynamic_mask and not any(n % w for n, w in zip(block.input_resolution, block.window_size))


class SplitWindowAttention(nn.Module):
    """The equal of Swin's WindowAttention in eval mode, its relative position bias looked up once, here.

    x [B * windows, N, C], mask [windows, N, N] or None -> [B * windows, N, C].
    """

    bias: torch.Tensor

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = attn.num_heads, 1.0
        self.qkv = SplitQKV(attn.qkv, attn.scale)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.window_size, self.window_area = attn.window_size, attn.window_area
        self.proj = attn.proj
        with torch.no_grad():
            self.register_buffer("bias", attn._get_rel_pos_bias().clone())

    @classmethod
    def of(cls, attn: Any) -> nn.Module:
        return cls(attn) if type(attn.qkv) is nn.Linear else attn  # a layer with arithmetic of its own cannot be split

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        windows, tokens, _ = x.shape
        joint = x.reshape(windows, tokens, -1)
        # all three layers first: between them, a reshape would keep XNNPACK's partitioner from joining what it dequantizes
        q, k, v = (y.reshape(windows, tokens, self.num_heads, -1) for y in [layer(joint) for layer in self.layers()])
        out = attend(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3), self.masked(mask, windows))
        return self.proj(out.permute(0, 2, 1, 3).reshape(windows, tokens, -1))

    def masked(self, mask: torch.Tensor | None, windows: int) -> torch.Tensor:
        """What is added to the logits of B * windows windows."""
        if mask is None:
            return self.bias
        return (self.bias + mask.unsqueeze(1)).repeat(windows // mask.shape[0], 1, 1, 1)

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The q, k and v layers."""
        return self.qkv.q, self.qkv.k, self.qkv.v

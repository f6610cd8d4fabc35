"""Multiply-accumulates of one image: counted as the model runs, and worked out from shapes. MACs, never FLOPs.

Counted: every matrix product and convolution that PyTorch executes for one image, attention products and the products of
merge sites included (in the sequence layout tokens move by index, at no cost).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import Family, Settings
from .errors import UsageError, check_count
from .modes import evaluating, fed


def default_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images a model is made for, in pixels, from its timm configuration, wherever it is wrapped."""
    parts: list[Any] = list(model.modules())
    fixed = next((size for m in parts if (size := getattr(getattr(m, "patch_embed", None), "img_size", None))), None)
    config: Any = next((c for m in parts if (c := getattr(m, "pretrained_cfg", None))), {})
    height, width = fixed or config.get("input_size", (3, 224, 224))[1:]
    return int(height), int(width)


def blank_image(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> Tensor:
    """One black image [1, C, H, W] in the model's type, on its device; img_size: a side, or height and width."""
    size = default_size(model) if img_size is None else img_size
    height, width = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    for side in (height, width):
        check_count("img_size", side)
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    like = next(model.parameters())
    return torch.zeros(1, channels, height, width, device=like.device, dtype=like.dtype)


def count_macs(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> int:
    """Multiply-accumulates of one image of img_size pixels (a side, or height and width), as counted while it runs."""
    return sum(_by_operator(model, img_size).values())


def _by_operator(model: nn.Module, img_size: int | tuple[int, int] | None) -> dict[str, int]:
    from torch.utils.flop_counter import FlopCounterMode

    counter, image = FlopCounterMode(display=False), blank_image(model, img_size)
    fused = _set_fused(model, False)
    try:
        with evaluating(model), torch.enable_grad(), counter:  # the counter fails on views made without gradients
            fed(model, image)
    finally:
        for module, value in fused:
            module.fused_attn = value  # type: ignore[assignment]
    flops = counter.get_flop_counts().get("Global", {})
    return {str(op): int(count) // 2 for op, count in flops.items()}


def _set_fused(model: nn.Module, value: bool) -> list[tuple[nn.Module, bool]]:
    """Fused attention hides its products from counters: switch it, and return what it was."""
    found = [(m, bool(m.fused_attn)) for m in model.modules() if hasattr(m, "fused_attn")]
    for module, _ in found:
        module.fused_attn = value  # type: ignore[assignment]
    return found


def analytic_macs(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> dict[str, int]:
    """Multiply-accumulates by module path, worked out from shapes: linears, convolutions, attention products, sites.

    A linear costs N * in * out, a convolution H' W' * out * in/groups * kernel, attention 2 N^2 C (LiteMLA 2 N d (d + 1)
    a head), a grid site the similarity, pooling and copying products of its lines. Agrees with `count_macs` within 1 %.
    """
    from .macs_analytic import by_module

    return by_module(model, blank_image(model, img_size))


def transformer_block_macs(tokens: int, width: int, *, mlp_tokens: int | None = None, mlp_ratio: float = 4.0) -> int:
    """A ViT block: 4 N C^2 + 2 N^2 C for attention on N tokens, 2 r M C^2 for the MLP on M (after merging)."""
    after = tokens if mlp_tokens is None else mlp_tokens
    return int(4 * tokens * width**2 + 2 * tokens**2 * width + 2 * mlp_ratio * after * width**2)


def solve_keep_ratio(
    model: nn.Module, family: Family, settings: Settings, share: float, img_size: int | None
) -> Settings:
    """The largest keep ratio whose model costs at most `share` of the base's MACs (bisection over real counts).

    Grids move in steps, so the budget is met from below. Raises UsageError when no ratio meets it. The model is left
    without sites.
    """
    if not 0 < share <= 1:
        raise UsageError(f"macs {share!r} is outside (0, 1]; 0.84 asks for 84 % of the base model's MACs")
    base = count_macs(model, img_size)

    def cost(ratio: float) -> float:
        try:
            family.insert(model, replace(settings, keep_ratio=ratio))
            return count_macs(model, img_size) / base
        finally:
            family.remove(model)

    low, high = _least_ratio(cost), 1.0
    if cost(low) > share:
        raise UsageError(
            f"macs {share} cannot be met by {settings.merger} at density {settings.density!r}: keep ratio {low:.2f}, the "
            f"least, still costs {cost(low):.3f} of the base; use another density"
        )
    while high - low > 0.004:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= share else (low, middle)
    return replace(settings, keep_ratio=round(low, 4))


def _least_ratio(cost: Any) -> float:
    for ratio in (0.25, 0.3, 0.4, 0.51):
        try:
            cost(ratio)
            return ratio
        except UsageError:
            continue
    return 0.6

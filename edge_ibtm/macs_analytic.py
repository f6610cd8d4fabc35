"""MACs worked out from shapes, module by module: an account that is independent of the counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import Attention
from timm.models.efficientvit_mit import LiteMLA
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from .backbones.common import MergedBlocks
from .backbones.vit import MergedViTBlocks
from .modes import evaluating, fed
from .plan import DensePlan, GridPlan, PrefixPlan
from .site import Merged, Site


def by_module(model: nn.Module, image: Tensor) -> dict[str, int]:
    """MACs of one image [1, C, H, W] by path of the linear, convolution, attention or site that costs them."""
    costs: dict[str, int] = {}

    reuses = _reuses(model)

    def watch(name: str, rule: Callable[[Any, Any, Any], int]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            costs[name] = costs.get(name, 0) + rule(module, inputs[0], output)
            if isinstance(module, Site):
                costs[name] += reuses.get(name, 0) * _moves(output, inputs[0].z.shape[-1])

        return hook

    handles = [
        module.register_forward_hook(watch(name, rule))
        for name, module in model.named_modules()
        for kind, rule in RULES.items()
        if isinstance(module, kind)
    ]
    try:
        with evaluating(model):
            fed(model, image)
    finally:
        for handle in handles:
            handle.remove()
    return costs


def _linear(module: nn.Linear, x: Tensor, _y: Any) -> int:
    return x.numel() // module.in_features * module.in_features * module.out_features


def _conv(module: nn.Conv2d, _x: Tensor, y: Tensor) -> int:
    return y.numel() * module.weight[0].numel()


def _attention(module: Any, x: Tensor, _y: Any) -> int:
    """Queries by keys and weights by values: 2 N^2 times the inner width, for each of the sequences."""
    sequences, tokens = x.shape[:2]
    inner = module.qkv.out_features // 3
    return 2 * sequences * tokens**2 * inner


def _linear_attention(module: LiteMLA, x: Tensor, _y: Any) -> int:
    """K^T V and Q (K^T V) of every head, V one column longer: 2 N d (d + 1) a head (arXiv 2205.14756, section 3)."""
    heads = module.qkv.conv.out_channels * (1 + len(module.aggreg)) // (3 * module.dim)
    return 2 * x.shape[0] * heads * x.shape[2] * x.shape[3] * module.dim * (module.dim + 1)


def _grid_lines(merged: Merged) -> list[DensePlan]:
    plan = merged.plan.inner if isinstance(merged.plan, PrefixPlan) else merged.plan
    return [p for p in (plan.rows, plan.columns) if p is not None] if isinstance(plan, GridPlan) else []


def _moves(merged: Merged, dim: int) -> int:
    """Pooling to P and copying back, line by line; by index, at no cost, in the sequence layout."""
    return sum(2 * p.share.numel() * dim for p in _grid_lines(merged))


def _site(_module: Site, tokens: Any, merged: Merged) -> int:
    """Similarity of the candidates, pooling, and copying back."""
    metric, count = tokens.metric.shape[-1], tokens.z.shape[1]
    if merged.plan is None:
        return 0
    shapes = [tuple(p.share.shape) for p in _grid_lines(merged)] or [(tokens.z.shape[0], 0, count)]
    return _moves(merged, tokens.z.shape[-1]) + sum(n * ((L + 1) // 2) * (L // 2) * metric for n, _, L in shapes)


def _reuses(model: nn.Module) -> dict[str, int]:
    """How many later blocks reuse the plan of each site (density "stage")."""
    found = {}
    for name, stage in model.named_modules():
        if isinstance(stage, MergedBlocks) and not getattr(stage, "once", False) and len(stage.sites) == 1:
            first = next(iter(stage.sites))
            reusing = 0 if isinstance(stage, MergedViTBlocks) else len(stage) - int(first) - 1
            found[f"{name}.sites.{first}"] = reusing
    return found


RULES: dict[Any, Callable[[Any, Any, Any], int]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    Attention: _attention,
    WindowAttention: _attention,
    LiteMLA: _linear_attention,
    Site: _site,
}

"""What a model may hold that rewrites would lose: hooks, and modules that stand at several places."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.utils import prune

from edge_ibtm.errors import UsageError

_REMEDIES = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
}


def refuse_hooks(model: nn.Module) -> None:
    """Raise UsageError where a part of the model has forward hooks: rewrites replace parts and read their weights."""
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if name and hooks:
            raise UsageError(f"{name} ({type(module).__name__}) cannot be rewritten for export: {_reason(hooks[0])}")


def _reason(hook: Any) -> str:
    if isinstance(hook, prune.BasePruningMethod):
        return f"it is pruned by a mask; first call torch.nn.utils.prune.remove(layer, {hook._tensor_name!r})"
    if remedy := _REMEDIES.get(type(hook).__name__):
        return f"its weight is made by {type(hook).__name__}; first call {remedy}"
    return (
        f"its forward hook {getattr(hook, '__qualname__', hook)} would be lost; first remove it by the handle that "
        "registered it, or do its work in a module's forward"
    )


def separate(model: nn.Module, seen: set[nn.Module] | None = None) -> nn.Module:
    """Give every place of a module that stands at several its own copy, in place: rewrites change it for one neighbour."""
    seen = {model} if seen is None else seen
    for name, child in model._modules.items():
        if child is None:
            continue
        if child in seen:
            child = copy.deepcopy(child)
            setattr(model, name, child)
        seen.add(child)
        separate(child, seen)
    return model

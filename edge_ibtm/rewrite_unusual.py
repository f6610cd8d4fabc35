"""What a model may hold that rewrites would lose: hooks, and modules that stand at several places."""

from __future__ import annotations

import copy

from torch import nn

from edge_ibtm.errors import UsageError


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

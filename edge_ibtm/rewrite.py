"""Numerically equal rewrites, applied before export, that make timm's modules lower to few, large subgraphs.

Each rewrite takes one class of modules; it is looked up by exact class, so subclasses that changed the arithmetic are
left alone. Constants of the rewritten modules are computed in double precision and stored in the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

Rewrite = Callable[[nn.Module], nn.Module]


@cache
def rewrites() -> dict[type[nn.Module], Rewrite]:
    """Module class -> function that gives its replacement (or the module itself, when it cannot be rewritten)."""
    from timm import layers
    from timm.models.efficientvit_mit import LiteMLA
    from timm.models.mobilevit import LinearSelfAttention, MobileVitBlock
    from timm.models.swin_transformer import WindowAttention

    from edge_ibtm.backbones.mobilevit import MergedMobileVitBlock
    from edge_ibtm.rewrite_attention import SplitAttention, SplitWindowAttention
    from edge_ibtm.rewrite_linear_attention import ChannelFirstMLA, SlicedLinearAttention
    from edge_ibtm.rewrite_mobilevit import MergedOnTokens, OnePermuteBlock
    from edge_ibtm.rewrite_norm import LinearNorm, MeanFreeNorm, PooledGroupNorm
    from edge_ibtm.rewrite_patches import LinearPatches

    table: dict[type[nn.Module], Rewrite] = {
        nn.LayerNorm: LinearNorm.of,
        layers.LayerNorm: LinearNorm.of,
        MeanFreeNorm: LinearNorm.of,
        layers.GroupNorm1: PooledGroupNorm.of,
        layers.PatchEmbed: LinearPatches.of,
        layers.Attention: SplitAttention.of,
        WindowAttention: SplitWindowAttention.of,
        LiteMLA: ChannelFirstMLA.of,
        LinearSelfAttention: SlicedLinearAttention.of,
        MobileVitBlock: OnePermuteBlock.of,
        MergedMobileVitBlock: MergedOnTokens.of,
        nn.Dropout: _identity,
        layers.DropPath: _identity,
    }
    return table


def prepare_for_export(model: nn.Module) -> nn.Module:
    """A rewritten copy of `model` in eval mode, equal to it up to rounding; the original is untouched; idempotent.

    Raises UsageError for parts with forward hooks, pruned layers among them.
    """
    from edge_ibtm.rewrite_class_token import class_token_only
    from edge_ibtm.rewrite_conv import fold_batch_norms
    from edge_ibtm.rewrite_stream import lighten_norms
    from edge_ibtm.rewrite_unusual import refuse_hooks, separate

    refuse_hooks(model)
    twin = separate(copy.deepcopy(model)).eval()
    fold_batch_norms(twin)
    lighten_norms(twin)
    return class_token_only(rewrite_modules(twin, rewrites()))


def export_rewritten(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], further: Rewrite | None = None
) -> torch.export.ExportedProgram:
    """torch.export of the rewritten copy of an eager module (rewritten by `further` too), its operators rewritten too."""
    from edge_ibtm.rewrite_graph import tidy
    from edge_ibtm.rewrite_ops import DelegateOps

    with torch.no_grad(), DelegateOps():
        twin = prepare_for_export(model)
        program = torch.export.export(further(twin) if further else twin, inputs)
    return tidy(program)


def rewrite_modules(module: nn.Module, table: dict[type[nn.Module], Rewrite]) -> nn.Module:
    """Replace modules of the classes in `table`, children before parents, in place; returns the (new) module."""
    for name, child in list(module.named_children()):
        changed = rewrite_modules(child, table)
        if changed is not child:
            setattr(module, name, changed)
    return table[type(module)](module) if type(module) in table else module


def _identity(module: nn.Module) -> nn.Module:
    return nn.Identity()

"""Rewrites of an exported graph: constants are computed now, operators that change nothing are removed."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
_NOTHING = {
    aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default, aten.to.dtype,
    aten._to_copy.default, aten.contiguous.default, aten.expand.default, aten.dropout.default, aten.clone.default,
}  # fmt: skip


def tidy(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Fold what depends on no input, drop operators without effect, compute repeated ones once; changed in place."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    from edge_ibtm.rewrite_share import share

    drop_no_ops(program.graph_module)
    return share(constant_prop_pass(program))


def drop_no_ops(module: GraphModule) -> None:
    """Remove copies, detaches, casts and expands whose output equals their input, and assertions on metadata."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in _NOTHING and _same(node, node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    module.recompile()


def _same(node: Node, source: Any) -> bool:
    mine, its = node.meta.get("val"), source.meta.get("val") if isinstance(source, Node) else None
    if mine is None or its is None:
        return False
    return mine.shape == its.shape and mine.dtype == its.dtype and mine.stride() == its.stride()

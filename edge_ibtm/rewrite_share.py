"""Equal operators of an exported graph, computed once.

Merge sites ask for the same lines and averages several times; export records every request. (Constants of equal content
count as the same input but are left apart: one that two delegates share does not survive lowering in executorch 1.5.1.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

_SMALL = 4096  # numbers in a constant whose content is compared


def share(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Let every operator that repeats an earlier one on the same inputs use its result; changed in place."""
    graph = program.graph
    written = set(written_values(graph))
    seen: dict[Any, Node] = {}
    alike = _constants_alike(program)
    for node in list(graph.nodes):
        if node.op != "call_function" or written.intersection({node, *node.all_input_nodes}) or _impure(node):
            continue
        key = (node.target, _frozen(node.args, alike), _frozen(node.kwargs, alike))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


def written_values(graph: torch.fx.Graph) -> Iterator[Node]:
    """Values that an operator writes in place, and what they are views of."""
    for node in graph.nodes:
        yield from written_by(node)


def written_by(node: Node) -> Iterator[Node]:
    """An operator that writes in place, and from its input on what that is a view of; nothing for another operator."""
    value: Any = node if node.op == "call_function" and _schema_of(node) is not None and _schema_of(node).is_mutable else None
    while isinstance(value, Node):
        yield value
        value = value.args[0] if value.args and value.op == "call_function" and aliases(value) else None


def _schema_of(node: Node) -> Any:
    return getattr(node.target, "_schema", None)


def aliases(node: Node) -> bool:
    """Whether an operator's output may be a view of its input."""
    schema = _schema_of(node)
    return schema is None or any(a.alias_info is not None for a in schema.arguments)


def _impure(node: Node) -> bool:
    schema = _schema_of(node)
    return schema is None or schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]


def _constants_alike(program: torch.export.ExportedProgram) -> dict[Node, Node]:
    """Small constants -> the first one of equal content."""
    first: dict[Any, Node] = {}
    alike: dict[Node, Node] = {}
    for node, value in constants_of(program).items():
        if value.numel() <= _SMALL:
            key = value.dtype, tuple(value.shape), bytes(value.cpu().contiguous().reshape(-1).view(torch.uint8).tolist())
            alike[node] = first.setdefault(key, node)
    return alike


def constants_of(program: torch.export.ExportedProgram) -> dict[Node, torch.Tensor]:
    """The graph's inputs that stand for constants and buffers; no parameters, which may be trained."""
    signature = program.graph_signature
    names = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
    known = {**program.state_dict, **program.constants}
    nodes = {node: known.get(names.get(node.name, "")) for node in program.graph.find_nodes(op="placeholder")}
    return {node: value for node, value in nodes.items() if isinstance(value, torch.Tensor)}


def _frozen(value: Any, alike: dict[Node, Node]) -> Any:
    """Arguments as something hashable, numbers told apart by type."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(v, alike) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v, alike)) for k, v in value.items())
    return (type(value).__name__, alike.get(value, value) if isinstance(value, Node) else value)

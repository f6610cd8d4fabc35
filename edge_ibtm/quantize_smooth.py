"""The channels of what linear layers read from a norm made alike, before dynamic quantization.

A token's 8 bits span its largest channel: a few large ones, which trained ViTs have, cost all others their precision. So
channels are divided by s and the weights of the layers multiplied by it, s_j = max |x_j|^a / max |W_j|^(1 - a). Source:
Xiao et al., SmoothQuant (arXiv:2211.10438), equation 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from edge_ibtm.quantize import module_types

STRENGTH = 0.5
_LEAST = 1e-5


def smooth_norms(graph: GraphModule, pieces: Iterable[Tensor], keep: Callable[[Node], bool]) -> int:
    """Smooth the outputs of norms that linear layers which `keep` accepts read, in place; the number of norms.

    pieces: images of the captured shape; the largest values count.
    """
    readers: dict[Node, list[Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and keep(node) and _is_norm(node.args[0]):
            readers.setdefault(node.args[0], []).append(node)
    largest = _largest(graph, set(readers), pieces)
    for index, (norm, layers) in enumerate(readers.items()):
        weights = [attrgetter(layer.args[1].target)(graph).detach() for layer in layers]  # type: ignore[union-attr, arg-type]
        most = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        scale = largest[norm].clamp_min(_LEAST) ** STRENGTH / most.clamp_min(_LEAST) ** (1 - STRENGTH)
        with graph.graph.inserting_after(norm):
            inverse = _constant(graph, f"_smooth_{index}", 1 / scale)
        with graph.graph.inserting_after(inverse):
            alike = graph.graph.call_function(torch.ops.aten.mul.Tensor, (norm, inverse))
        alike.meta = dict(norm.meta)
        for number, (layer, weight) in enumerate(zip(layers, weights)):
            with graph.graph.inserting_before(layer):
                scaled = _constant(graph, f"_smooth_{index}_{number}", weight * scale)
            layer.args = (alike, scaled, *layer.args[2:])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return len(readers)


def _is_norm(node: object) -> bool:
    kinds = module_types(node) if isinstance(node, Node) else []
    return bool(kinds) and kinds[-1].startswith("edge_ibtm.rewrite_norm.")


def _constant(graph: GraphModule, name: str, value: Tensor) -> Node:
    graph.register_parameter(name, nn.Parameter(value, requires_grad=False))
    node = graph.graph.get_attr(name)
    node.meta["val"] = value
    return node


class _Largest(Interpreter):
    """Runs a graph and keeps the largest magnitude of every channel of some values."""

    def __init__(self, graph: GraphModule, nodes: set[Node]) -> None:
        super().__init__(graph)
        self.seen: dict[Node, Tensor] = {}
        self.nodes = nodes

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n in self.nodes:
            most = value.abs().flatten(0, -2).amax(0)  # type: ignore[attr-defined]
            self.seen[n] = torch.maximum(self.seen[n], most) if n in self.seen else most
        return value


def _largest(graph: GraphModule, nodes: set[Node], pieces: Iterable[Tensor]) -> dict[Node, Tensor]:
    runner = _Largest(graph, nodes)
    with torch.no_grad():
        for piece in pieces:
            runner.run(piece)
    return runner.seen

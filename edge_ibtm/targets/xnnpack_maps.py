"""Batched products that read maps [1, a, b, c] as they are.

A product of rows of tokens takes [a, b, c]. Where more than one operator reads a value or what it is reshaped to, XNNPACK
copies it, even to take an axis of 1 away, which its products take too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

from edge_ibtm.targets.xnnpack_values import NOTHING, inputs_of, output_of, tensor_of


def read_maps(graph: schema.XNNGraph) -> bool:
    """Let one product read a map before its reshape, in place; whether there was one. The outputs keep every bit."""
    return any(_Maps(graph).widened(node) for node in graph.xnodes)


class _Maps:
    def __init__(self, graph: schema.XNNGraph) -> None:
        self.graph = graph
        self.tensors = {tensor_of(value).id_out: tensor_of(value) for value in graph.xvalues}
        self.maker = {output_of(node.xnode_union): node.xnode_union for node in graph.xnodes}
        self.reads: dict[int, list[Any]] = defaultdict(list)
        for node in graph.xnodes:
            for name in inputs_of(node.xnode_union):
                self.reads[getattr(node.xnode_union, name)].append(node.xnode_union)

    def widened(self, node: schema.XNode) -> bool:
        """Give a product's values a first axis of 1, where the second factor is a map's; what it made is reshaped back."""
        product: Any = node.xnode_union
        if not isinstance(product, schema.XNNBatchMatrixMultiply) or (map_ := self.map_of(product)) is None:
            return False
        first, made, before = map_, self.like(product.output_id), []
        if product.input1_id != product.input2_id:
            first = self.like(product.input1_id)
            before = [self.reshape(product.input1_id, first, node)]
        after = self.reshape(made, product.output_id, node)
        product.input1_id, product.input2_id, product.output_id = first, map_, made
        where = next(i for i, other in enumerate(self.graph.xnodes) if other is node)
        self.graph.xnodes[where : where + 1] = [*before, node, after]
        return True

    def map_of(self, product: Any) -> int | None:
        """The map [1, a, b, c] that reshapes made a product's second factor [a, b, c], if that saves a copy; else None."""
        value = product.input2_id
        if any(not isinstance(r, schema.XNNBatchMatrixMultiply) or r.input2_id != value for r in self.reads[value]):
            return None
        dims, copied = self.tensors[value].dims, False
        while isinstance(reshape := self.maker.get(value), schema.XNNStaticReshape):
            copied |= len(self.reads[value]) > 1 or len(self.reads[reshape.input_id]) > 1
            value = reshape.input_id
            if self.tensors[value].dims == [1, *dims]:
                others = {product.input1_id, product.output_id} - {product.input2_id}
                more = sum(math.prod(self.tensors[v].dims) for v in others if len(self.reads[v]) > 1)
                return value if copied and more < math.prod(dims) else None
        return None

    def like(self, value: int) -> int:
        """A new value, another one with a first axis of 1."""
        made, old = max(self.tensors) + 1, self.tensors[value]
        new = replace(old, dims=[1, *old.dims], num_dims=old.num_dims + 1, id_out=made, external_id=NOTHING, flags=0)
        self.tensors[made] = new
        self.graph.xvalues.append(schema.XValue(new))
        return made

    def reshape(self, value: int, made: int, like: schema.XNode) -> schema.XNode:
        dims = list(self.tensors[made].dims)
        return schema.XNode(schema.XNNStaticReshape(len(dims), dims, value, made, 0), like.debug_handle)

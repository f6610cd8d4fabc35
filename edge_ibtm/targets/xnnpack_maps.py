"""Batched products that read maps [1, a, b, c] as they are.

A product of rows of tokens takes [a, b, c]. Where more than one operator reads a value or what it is reshaped to, XNNPACK
copies it, even to take an axis of 1 away, which its products take too.
"""

from __future__ import annotations

import math
from typing import Any

from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

from edge_ibtm.targets.xnnpack_values import Index, new_value


def read_maps(graph: schema.XNNGraph) -> bool:
    """Let one product read a map before its reshape, in place; whether there was one. The outputs keep every bit."""
    return any(map(_Maps(graph).widened, graph.xnodes))


class _Maps(Index):
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
        if any(not isinstance(r, schema.XNNBatchMatrixMultiply) or r.input2_id != value for r in self.readers[value]):
            return None
        dims, copied = self.dims(value), False
        while (reshape := self.made(value, schema.XNNStaticReshape)) is not None:
            copied |= len(self.readers[value]) > 1 or len(self.readers[reshape.input_id]) > 1
            value = reshape.input_id
            if self.dims(value) == [1, *dims]:
                others = {product.input1_id, product.output_id} - {product.input2_id}
                more = sum(math.prod(self.dims(v)) for v in others if len(self.readers[v]) > 1)
                return value if copied and more < math.prod(dims) else None
        return None

    def like(self, value: int) -> int:
        """A new value, another one with a first axis of 1."""
        made = new_value(self.values, value, [1, *self.dims(value)])
        self.graph.xvalues.append(self.values[made])
        return made

    def reshape(self, value: int, made: int, like: schema.XNode) -> schema.XNode:
        dims = list(self.dims(made))
        return schema.XNode(schema.XNNStaticReshape(len(dims), dims, value, made, 0), like.debug_handle)

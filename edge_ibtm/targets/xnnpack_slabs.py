"""Inverted residual blocks of large maps, slab by slab, so that their widest values stay in a cache.

Between its two pointwise convolutions such a block is several times as wide as its input, and what stands there (a SiLU is two
operators, then the depthwise convolution) reads and writes megabytes for a few operations a number. Here the rows of the
block's output are cut into slabs; each slab computes the rows it reads anew, in the same way, so every bit stays.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

from edge_ibtm.targets.xnnpack_values import NOTHING, inputs_of, new_value, output_of, tensor_of

SLAB = 2**20  # bytes of a slab's widest value
FEWEST = 3  # slabs below which the rows computed twice and the copies cost more
_SILU = schema.XNNSigmoid | schema.XNNMultiply
_FLOAT = schema.XNNDatatype.xnn_datatype_fp32


@dataclass(frozen=True)
class Slab:
    """Rows [first, last) of a block's output, which read rows [low, high) of its input, and rows of zeros around those."""

    first: int
    last: int
    low: int
    high: int
    above: int
    below: int


def slabs(deep: Any, rows: int, out_rows: int, count: int) -> list[Slab]:
    """`count` slabs of about equal height of a depthwise convolution from maps of `rows` to maps of `out_rows` rows."""
    edges = [out_rows * i // count for i in range(count + 1)]
    reach = deep.dilation_height * (deep.kernel_height - 1) + 1
    made = []
    for first, last in zip(edges, edges[1:]):
        low = first * deep.subsampling_height - deep.padding_top
        high = (last - 1) * deep.subsampling_height - deep.padding_top + reach
        made.append(Slab(first, last, max(low, 0), min(high, rows), max(-low, 0), max(high - rows, 0)))
    return made


def in_slabs(graph: schema.XNNGraph) -> None:
    """Run the blocks of large float maps slab by slab; in place. The outputs keep every bit."""
    cutter = _Cutter(graph)
    nodes: list[schema.XNode] = []
    left = graph.xnodes
    while left:
        block = cutter.block(left)
        nodes += cutter.cut(block) if block else left[:1]
        left = left[len(block) or 1 :]
    graph.xnodes, graph.xvalues = nodes, list(cutter.values.values())


class _Cutter:
    """Finds blocks in a graph and makes their slabs' nodes and values."""

    def __init__(self, graph: schema.XNNGraph) -> None:
        self.values = {tensor_of(value).id_out: value for value in graph.xvalues}
        self.reads = Counter(value for node in graph.xnodes for value in _read(node.xnode_union))

    def block(self, nodes: list[schema.XNode]) -> list[schema.XNode]:
        """The nodes of the block that starts with the first one; none where none does.

        A pointwise convolution to a large map, SiLUs and one depthwise convolution, and a pointwise convolution. With a hard
        swish, one operator, there is less to save: EfficientViT-B1 lost by slabs.
        """
        first: Any = nodes[0].xnode_union
        if not _pointwise(first) or self._count(first.output_id) < FEWEST:
            return []
        here, reads = {first.output_id}, Counter[int]()
        for count, node in enumerate(nodes[1:], 2):
            operator: Any = node.xnode_union
            weights = {getattr(operator, name, NOTHING) for name in ("filter_id", "bias_id")}
            read = [value for value in _read(operator) if value not in weights]
            reads.update(read)
            if not here.issuperset(read):  # of the same height, and no constant, which might differ from row to row
                return []
            if _pointwise(operator):
                return nodes[:count] if self._fits(nodes[:count], reads) else []
            if isinstance(operator, schema.XNNDepthwiseConv2d):
                here = set()
            elif not isinstance(operator, _SILU):
                return []
            here.add(operator.output_id)
        return []

    def _fits(self, block: list[schema.XNode], reads: Counter[int]) -> bool:
        """Whether it has a SiLU and one depthwise convolution, rows for every slab, and values that nothing else reads."""
        kinds = Counter(type(node.xnode_union) for node in block)
        if kinds[schema.XNNDepthwiseConv2d] != 1 or not kinds[schema.XNNMultiply]:
            return False
        inside = [output_of(node.xnode_union) for node in block[:-1]]
        alone = all(reads[value] == self.reads[value] and not self._external(value) for value in inside)
        return alone and all(s.first < s.last and s.low < s.high for s in self._slabs(block))

    def _count(self, value: int) -> int:
        """Slabs of a value: 0 for one that is not float or of more than one image."""
        tensor = tensor_of(self.values[value])
        if tensor.datatype != _FLOAT or len(tensor.dims) != 4 or tensor.dims[0] != 1:
            return 0
        return min(math.ceil(4 * math.prod(tensor.dims) / SLAB), tensor.dims[1] // 4)

    def _external(self, value: int) -> bool:
        return bool(tensor_of(self.values[value]).external_id != NOTHING)

    def _rows_of(self, value: int) -> int:
        return int(tensor_of(self.values[value]).dims[1])

    def _slabs(self, block: list[schema.XNode]) -> list[Slab]:
        first, last = (node.xnode_union for node in (block[0], block[-1]))
        deep = next(node.xnode_union for node in block if isinstance(node.xnode_union, schema.XNNDepthwiseConv2d))
        return slabs(deep, self._rows_of(first.input1_id), self._rows_of(last.output_id), self._count(first.output_id))

    def cut(self, block: list[schema.XNode]) -> Iterator[schema.XNode]:
        """The nodes of a block, slab after slab, and what puts its output together."""
        first, last = (node.xnode_union for node in (block[0], block[-1]))
        parts = []
        for slab in self._slabs(block):
            height = slab.high - slab.low
            part = self._part(first.input1_id, height)
            dims = list(tensor_of(self.values[part]).dims)
            cut = schema.XNNStaticSlice(4, [0, slab.low, 0, 0], dims, first.input1_id, part, 0)
            yield schema.XNode(cut, block[0].debug_handle)
            names = {first.input1_id: part}
            for node in block:
                operator: Any = node.xnode_union
                if isinstance(operator, schema.XNNDepthwiseConv2d):
                    height = slab.last - slab.first
                    operator = replace(operator, padding_top=slab.above, padding_bottom=slab.below)
                names[operator.output_id] = self._part(operator.output_id, height)
                renamed = {k: names.get(v := getattr(operator, k), v) for k in (*inputs_of(operator), "output_id")}
                yield replace(node, xnode_union=replace(operator, **renamed))
            parts.append(names[last.output_id])
        for node in block[:-1]:
            del self.values[output_of(node.xnode_union)]
        yield from self._together(parts, last.output_id, block[-1])

    def _together(self, parts: list[int], whole: int, like: schema.XNode) -> Iterator[schema.XNode]:
        """Nodes that put parts, rows of them, together: one takes five at most."""
        while len(parts) > 5:
            each = math.ceil(len(parts) / math.ceil(len(parts) / 5))
            groups = [parts[i : i + each] for i in range(0, len(parts), each)]
            parts = [g[0] if len(g) == 1 else self._part(whole, sum(map(self._rows_of, g))) for g in groups]
            for group, part in zip(groups, parts):
                if len(group) > 1:
                    yield schema.XNode(_concatenated(group, part), like.debug_handle)
        yield schema.XNode(_concatenated(parts, whole), like.debug_handle)

    def _part(self, like: int, rows: int) -> int:
        """A new value of so many rows, else like another one."""
        dims = tensor_of(self.values[like]).dims
        return new_value(self.values, like, [dims[0], rows, *dims[2:]])


def _concatenated(parts: list[int], whole: int) -> Any:
    kinds = {2: schema.XNNConcatenate2, 3: schema.XNNConcatenate3, 4: schema.XNNConcatenate4, 5: schema.XNNConcatenate5}
    ids = [*parts, *[NOTHING] * (5 - len(parts))]
    return kinds[len(parts)](1, *ids[:4], whole, 0, ids[4])


def _pointwise(operator: Any) -> bool:
    """Whether it is a convolution of every pixel alone."""
    if not isinstance(operator, schema.XNNConv2d) or operator.groups != 1:
        return False
    sizes = operator.kernel_height, operator.kernel_width, operator.subsampling_height, operator.subsampling_width
    pads = operator.padding_top, operator.padding_bottom, operator.padding_left, operator.padding_right
    return set(sizes) == {1} and not any(pads)


def _read(operator: Any) -> list[int]:
    return [getattr(operator, name) for name in inputs_of(operator)]

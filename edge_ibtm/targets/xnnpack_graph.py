"""XNNPACK's graph before it is written: what moves values there and back is taken out.

ExecuTorch turns every map to channels last for a convolution and back for whatever else reads it, and writes each
permutation, reshape and conversion of the exported graph as a node of its own. Many undo each other; that can be seen only
here, where the axes of every value are in the order that they have in memory. Names of constants are shortened too.
"""

from __future__ import annotations

import base64
import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.operators import node_visitor
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

from edge_ibtm.targets.xnnpack_maps import read_maps
from edge_ibtm.targets.xnnpack_slabs import in_slabs
from edge_ibtm.targets.xnnpack_values import NOTHING, Index, Operator, inputs_of, output_of, tensor_of

TRANSPOSED_SECOND = 1  # XNN_FLAG_TRANSPOSE_B of xnnpack.h


def name_of(data: bytes) -> Any:
    """A constant's name as ExecuTorch asks for it (`.hexdigest()`): 64 bits in 11 characters instead of 256 in 64.

    Each name is in a file twice, and a small 8-bit model has some 400 constants.
    """
    name = base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:8]).decode().rstrip("=")
    return SimpleNamespace(hexdigest=lambda: name)


@contextmanager
def simplified() -> Iterator[None]:
    """While the block runs, ExecuTorch simplifies XNNPACK's graphs before it writes them, and cuts large maps into slabs.

    Names of constants are shortened and biases share their steps as the graph is made.
    """
    serialize = xnnpack_preprocess.serialize_xnnpack_binary

    def write(graph: schema.XNNGraph, constants: bytearray) -> bytes:
        simplify(graph)
        in_slabs(graph)
        return serialize(graph, constants)  # type: ignore[no-any-return]

    steps_of = node_visitor.NodeVisitor.get_quant_params

    def steps(self: Any, params: Any, *rest: Any, **options: Any) -> Any:
        return steps_of(self, nominal(params), *rest, **options)

    names = patch.object(node_visitor, "hashlib", SimpleNamespace(sha256=name_of))
    with (
        patch.object(xnnpack_preprocess, "serialize_xnnpack_binary", write),
        patch.object(node_visitor.NodeVisitor, "get_quant_params", steps),
        names,
    ):
        yield


def nominal(params: Any) -> Any:
    """A bias's steps [C] as ones, which all biases of C channels share: XNNPACK wants some, reads weights' and inputs'."""
    if not params.per_channel or params.dtype != torch.int32:
        return params
    params = copy.copy(params)
    params.scale = torch.ones_like(params.scale)
    return params


def simplify(graph: schema.XNNGraph) -> None:
    """Take out nodes that undo each other, and repeated constants; in place. The outputs keep every bit."""
    while _Graph(graph).simplify() or read_maps(graph):
        pass
    _share_constants(graph)


class _Graph(Index):
    """The rules, on the graph."""

    def simplify(self) -> bool:
        """One pass over all nodes; whether anything changed."""
        gone = {value for value in self.maker if not self.readers[value] and not self.external(value)}
        changed = bool(gone)
        for node in self.graph.xnodes:
            rule = _RULES.get(type(node.xnode_union))
            if rule is not None and output_of(node.xnode_union) not in gone:
                lost = rule(self, node)
                changed |= lost is not None
                gone.update(lost or ())
        self.graph.xnodes = [n for n in self.graph.xnodes if output_of(n.xnode_union) not in gone]
        self.graph.xvalues = [v for v in self.graph.xvalues if tensor_of(v).id_out not in gone]
        return changed

    def source(self, operator: Any, kind: type[Operator]) -> Operator | None:
        """The operator of `kind` that makes another one's input, which nothing else reads."""
        alone = len(self.readers[operator.input_id]) == 1 and not self.external(operator.input_id)
        return self.made(operator.input_id, kind) if alone else None

    def only_reshaped(self, value: int) -> bool:
        """Whether nothing but reshapes reads a value, which may so have other dims."""
        readers = self.readers[value]
        return not self.external(value) and all(isinstance(reader, schema.XNNStaticReshape) for reader in readers)

    def bypass(self, operator: Any, source: Any) -> set[int]:
        """Let `operator` read what its source reads; returns the value that goes."""
        gone, operator.input_id = operator.input_id, source.input_id
        self.hand_over(source.input_id, source, operator)
        return {gone}

    def hand_over(self, value: int, old: Any, new: Any) -> None:
        """Note that `new` reads a value where `old` did."""
        self.readers[value] = [new if reader is old else reader for reader in self.readers[value]]

    def forward(self, operator: Any, value: int) -> set[int] | None:
        """Let whoever reads the operator's output read `value`; returns the value that goes, None if it has to stay."""
        gone = operator.output_id
        if self.external(gone):
            return None
        for reader in self.readers[gone]:
            for name in inputs_of(reader):
                if getattr(reader, name) == gone:
                    setattr(reader, name, value)
        self.readers[operator.input_id] = [r for r in self.readers[operator.input_id] if r is not operator]
        self.readers[value] += self.readers[gone]
        return {gone}

    def transpose(self, node: schema.XNode) -> set[int] | None:
        """Two permutations are one; one that moves no axis longer than 1 is a reshape, and others do without such axes."""
        operator: Any = node.xnode_union
        first = self.source(operator, schema.XNNStaticTranspose)
        if first is not None:
            operator.perm = [first.perm[i] for i in operator.perm]
            return self.bypass(operator, first)
        dims = self.dims(operator.input_id)
        moved = [i for i in operator.perm if dims[i] != 1]
        if moved != sorted(moved):
            return set() if self.narrow(operator, dims) else None
        shape = [dims[i] for i in operator.perm]
        reshape = schema.XNNStaticReshape(len(shape), shape, operator.input_id, operator.output_id, 0)
        self.hand_over(operator.input_id, operator, reshape)
        node.xnode_union = reshape
        return set()

    def narrow(self, operator: Any, dims: list[int]) -> bool:
        """Drop axes of 1 between two reshapes, which often become nothing."""
        first = self.source(operator, schema.XNNStaticReshape)
        if 1 not in dims or first is None or not self.only_reshaped(operator.output_id):
            return False
        wide = [i for i, length in enumerate(dims) if length != 1]
        self.cut(operator.input_id, [dims[i] for i in wide])
        self.cut(operator.output_id, [dims[i] for i in operator.perm if i in wide])
        operator.perm = [wide.index(i) for i in operator.perm if i in wide]
        operator.num_dims = first.num_dims = len(wide)
        for reshape in (first, *self.readers[operator.output_id]):
            reshape.new_shape = list(self.dims(reshape.output_id))
        return True

    def cut(self, value: int, dims: list[int]) -> None:
        """Give a value between operators other dims."""
        tensor = tensor_of(self.values[value])
        tensor.dims, tensor.num_dims = dims, len(dims)

    def reshape(self, node: schema.XNode) -> set[int] | None:
        """Two reshapes are one, one that changes nothing is none; 8-bit values are converted after they are reshaped."""
        operator: Any = node.xnode_union
        first = self.source(operator, schema.XNNStaticReshape)
        if first is not None:
            return self.bypass(operator, first)
        if self.dims(operator.input_id) == self.dims(operator.output_id):
            return self.forward(operator, operator.input_id)
        if self.split(operator):
            return set()
        convert = self.source(operator, schema.XNNConvert)
        if convert is None or self.steps(convert.input_id) is None:
            return None
        self.swap(self.maker[convert.output_id], node)
        return set()

    def split(self, operator: Any) -> bool:
        """Read what a reshaped value was, where nothing but reshapes reads it: each copies, and one copy less is made."""
        first = self.made(operator.input_id, schema.XNNStaticReshape)
        if first is None or not self.only_reshaped(operator.input_id):
            return False
        self.readers[operator.input_id] = [r for r in self.readers[operator.input_id] if r is not operator]
        self.readers[first.input_id].append(operator)
        operator.input_id, operator.new_shape = first.input_id, list(self.dims(operator.output_id))
        return True

    def steps(self, value: int) -> schema.PerTensorQuant | None:
        """The steps of an 8-bit value, where they are the same everywhere."""
        steps = getattr(self.values[value].xvalue_union, "quant_params", None)
        return steps if isinstance(steps, schema.PerTensorQuant) else None

    def swap(self, before: schema.XNode, after: schema.XNode) -> None:
        """An 8-bit value's conversion, then a reshape: the other way round."""
        convert, reshape = before.xnode_union, after.xnode_union
        origin, between = convert.input_id, convert.output_id
        self.round(between, self.dims(reshape.output_id), origin)
        convert.output_id, convert.input_id = reshape.output_id, between
        reshape.output_id, reshape.input_id = between, origin
        before.xnode_union, after.xnode_union = reshape, convert
        self.hand_over(origin, convert, reshape)
        self.readers[between] = [convert]

    def round(self, value: int, dims: list[int], like: int) -> None:
        """Make a value between operators one of 8 bits, of `dims`, with the steps of another."""
        tensor = replace(tensor_of(self.values[like]), num_dims=len(dims), dims=dims, id_out=value)
        tensor.constant_buffer_idx, tensor.external_id, tensor.flags = 0, NOTHING, 0
        self.values[value].xvalue_union = schema.XNNQuantizedTensorValue(tensor, self.steps(like))

    def convert(self, node: schema.XNode) -> set[int] | None:
        """An 8-bit value that was converted and is converted back to the same steps is the value itself."""
        operator: Any = node.xnode_union
        first = self.made(operator.input_id, schema.XNNConvert)
        if first is None or (steps := self.steps(operator.output_id)) is None:
            return None
        kind, origin = tensor_of(self.values[operator.output_id]).datatype, tensor_of(self.values[first.input_id]).datatype
        same = kind == origin and steps == self.steps(first.input_id)
        return self.forward(operator, first.input_id) if same else None

    def sigmoid(self, node: schema.XNode) -> set[int] | None:
        """Between two conversions, of 8-bit values."""
        operator: Any = node.xnode_union
        first, readers = self.source(operator, schema.XNNConvert), self.readers[operator.output_id]
        last = readers[0] if len(readers) == 1 and not self.external(operator.output_id) else None
        if first is None or not isinstance(last, schema.XNNConvert):
            return None
        if self.steps(first.input_id) is None or self.steps(last.output_id) is None:
            return None
        gone = self.forward(last, operator.output_id)
        if gone is None:
            return None
        self.round(operator.output_id, self.dims(operator.output_id), last.output_id)
        return gone | self.bypass(operator, first)

    def product(self, node: schema.XNode) -> set[int] | None:
        """Batched products read a second factor whose last two axes were swapped as it was: runs of memory are moved whole."""
        operator: Any = node.xnode_union
        read = SimpleNamespace(input_id=operator.input2_id)
        reshape = self.source(read, schema.XNNStaticReshape)
        if reshape is not None and self.dims(reshape.input_id)[-2:] != self.dims(reshape.output_id)[-2:]:
            return None
        turn = self.source(reshape or read, schema.XNNStaticTranspose)
        if operator.flags or turn is None or turn.perm[-2] != len(turn.perm) - 1:
            return None
        turn.perm = [*turn.perm[:-2], turn.perm[-1], turn.perm[-2]]
        for moved in (turn, reshape) if reshape else (turn,):
            dims = self.dims(moved.output_id)
            self.cut(moved.output_id, [*dims[:-2], dims[-1], dims[-2]])
        if reshape is not None:
            reshape.new_shape = list(self.dims(reshape.output_id))
        operator.flags = TRANSPOSED_SECOND
        return set()


_RULES: dict[type, Callable[[_Graph, schema.XNode], set[int] | None]] = {
    schema.XNNStaticTranspose: _Graph.transpose,
    schema.XNNStaticReshape: _Graph.reshape,
    schema.XNNConvert: _Graph.convert,
    schema.XNNSigmoid: _Graph.sigmoid,
    schema.XNNBatchMatrixMultiply: _Graph.product,
}


def _share_constants(graph: schema.XNNGraph) -> None:
    """Let values of equal constants name one entry; in place."""
    first: dict[str, int] = {}
    kept: list[schema.ConstantDataOffset] = []
    moved = []
    for constant in graph.constant_data:
        new = first.setdefault(constant.named_key, len(kept))
        if new == len(kept):
            kept.append(constant)
        moved.append(new)
    for value in graph.xvalues:
        tensor, steps = tensor_of(value), getattr(value.xvalue_union, "quant_params", None)
        tensor.constant_buffer_idx = moved[tensor.constant_buffer_idx]
        if isinstance(steps, schema.PerChannelQuant | schema.PerChannelGroupQuant):
            steps.scale_buffer_idx = moved[steps.scale_buffer_idx]
    graph.constant_data = kept

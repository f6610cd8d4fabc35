"""XNNPACK's graph without what undoes itself: every bit of the outputs stays, and what is left is not there twice."""

from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_INVALID_VALUE_ID as NOTHING
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_ibtm
from edge_ibtm.targets import xnnpack_graph
from edge_ibtm.targets.runtime import run_pte
from edge_ibtm.targets.xnnpack_graph import TRANSPOSED_SECOND, name_of, simplify
from edge_ibtm.targets.xnnpack_values import inputs_of, tensor_of

FLOAT, INT8 = schema.XNNDatatype.xnn_datatype_fp32, schema.XNNDatatype.xnn_datatype_qint8
SIGMOID = schema.PerTensorQuant(1 / 256, -128)
PRODUCT = "BatchMatrixMultiply"


class Graph:
    """Builds an XNNGraph node by node from one external input of `dims`."""

    def __init__(self, *dims):
        self.graph = schema.XNNGraph("0", [], [], 1, [0], [], [schema.ConstantDataOffset(0, 0)])
        self.value(list(dims), external=0)

    def value(self, dims, steps=None, external=NOTHING):
        tensor = schema.XNNTensorValue(
            INT8 if steps else FLOAT, len(dims), dims, 0, external, 0, len(self.graph.xvalues)
        )
        union = schema.XNNQuantizedTensorValue(tensor, steps) if steps else tensor
        self.graph.xvalues.append(schema.XValue(union))
        return tensor.id_out

    def dims(self, value):
        return tensor_of(self.graph.xvalues[value]).dims

    def steps(self, value):
        return getattr(self.graph.xvalues[value].xvalue_union, "quant_params", None)

    def add(self, operator):
        self.graph.xnodes.append(schema.XNode(operator, len(self.graph.xnodes)))
        return operator.output_id

    def transpose(self, source, perm):
        out = self.value([self.dims(source)[i] for i in perm], self.steps(source))
        return self.add(schema.XNNStaticTranspose(len(perm), list(perm), source, out, 0))

    def reshape(self, source, shape):
        out = self.value(list(shape), self.steps(source))
        return self.add(schema.XNNStaticReshape(len(shape), list(shape), source, out, 0))

    def convert(self, source, steps):
        return self.add(schema.XNNConvert(source, self.value(self.dims(source), steps), 0))

    def sigmoid(self, source):
        return self.add(schema.XNNSigmoid(source, self.value(self.dims(source), self.steps(source)), 0))

    def sum(self, first, second):
        return self.add(schema.XNNAdd(first, second, self.value(self.dims(first)), 0))

    def product(self, first, second):
        out = self.value([*self.dims(first)[:-1], self.dims(second)[-1]])
        return self.add(schema.XNNBatchMatrixMultiply(first, second, out, 0))

    def ends(self, *values):
        for i, value in enumerate(values):
            tensor_of(self.graph.xvalues[value]).external_id = 1 + i
        return self.graph


def to_steps(x, steps):
    return np.clip(np.round(x / np.float32(steps.scale)) + steps.zero_point, -128, 127).astype(np.int8)


def to_float(x, steps):
    return (x.astype(np.float32) - steps.zero_point) * np.float32(steps.scale)


def run(graph, x):
    """What the graph computes, {external id: array}; ends with an error where shapes do not fit what is declared."""
    known = {tensor_of(value).id_out: value for value in graph.xvalues}
    steps = {i: getattr(value.xvalue_union, "quant_params", None) for i, value in known.items()}
    values = {0: x}
    for node in graph.xnodes:
        operator = node.xnode_union
        source, out = getattr(operator, "input_id", None), operator.output_id
        if isinstance(operator, schema.XNNStaticTranspose):
            result = values[source].transpose(operator.perm)
        elif isinstance(operator, schema.XNNStaticReshape):
            result = values[source].reshape(operator.new_shape)
        elif isinstance(operator, schema.XNNConvert):
            floats = to_float(values[source], steps[source]) if steps[source] else values[source]
            result = to_steps(floats, steps[out]) if steps[out] else floats
        elif isinstance(operator, schema.XNNSigmoid):
            floats = to_float(values[source], steps[source]) if steps[source] else values[source]
            gate = 1 / (1 + np.exp(-floats))
            result = to_steps(gate, steps[out]) if steps[out] else gate
        elif isinstance(operator, schema.XNNBatchMatrixMultiply):
            second = values[operator.input2_id]
            second = second.swapaxes(-1, -2) if operator.flags == TRANSPOSED_SECOND else second
            result = np.ascontiguousarray(values[operator.input1_id]) @ np.ascontiguousarray(second)
        else:
            result = values[operator.input1_id] + values[operator.input2_id]
        declared = tensor_of(known[out])
        assert list(result.shape) == declared.dims and declared.num_dims == result.ndim
        assert result.dtype == (np.int8 if declared.datatype == INT8 else np.float32)
        values[out] = result
    return {tensor_of(known[i]).external_id: v for i, v in values.items() if tensor_of(known[i]).external_id != NOTHING}


def kinds(graph):
    return [type(node.xnode_union).__name__.removeprefix("XNN") for node in graph.xnodes]


@st.composite
def graphs(draw):
    """Chains of what is simplified, with values that several nodes read and one or two outputs."""
    dims = draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=2, max_size=4))
    made = Graph(*dims)
    a, b = schema.PerTensorQuant(0.05, 3), schema.PerTensorQuant(0.1, 0)
    value, earlier = 0, [0]
    for _ in range(draw(st.integers(1, 14))):
        shape, floats = made.dims(value), made.steps(value) is None
        step = draw(st.sampled_from("ttrrccsjapp"))
        if step == "t":
            value = made.transpose(value, draw(st.permutations(range(len(shape)))))
        elif step == "r":
            value = made.reshape(value, draw(st.sampled_from([shape, [1, *shape], [math.prod(shape)], shape[::-1]])))
        elif step == "c":
            value = made.convert(value, draw(st.sampled_from([a, b])) if floats else None)
        elif step == "s" and floats:
            value = made.sigmoid(value)
        elif step == "j":
            value = draw(st.sampled_from(earlier))
        elif step == "a" and floats:
            alike = [v for v in earlier if made.dims(v) == shape and made.steps(v) is None]
            value = made.sum(value, draw(st.sampled_from(alike))) if alike else value
        elif step == "p" and floats and len(shape) > 1:
            ends = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
            alike = [v for v in earlier if made.dims(v) == [shape[i] for i in ends] and made.steps(v) is None]
            value = made.product(draw(st.sampled_from(alike)) if alike else made.transpose(value, ends), value)
        earlier.append(value)
    ends = {v for v in (value, draw(st.sampled_from(earlier))) if v != 0}
    return made.ends(*ends) if ends else made.ends(made.sigmoid(0))


@settings(max_examples=300, deadline=None)
@given(graph=graphs())
def test_outputs_keep_every_bit(graph):
    before = copy.deepcopy(graph)
    x = np.random.default_rng(0).normal(size=tensor_of(graph.xvalues[0]).dims).astype(np.float32)
    simplify(graph)
    wanted, got = run(before, x), run(graph, x)
    assert wanted.keys() == got.keys()
    assert all(np.array_equal(wanted[i], got[i]) for i in wanted)
    assert len(copies(graph)) <= len(copies(before))
    assert len(graph.xnodes) - len(before.xnodes) <= 2 * kinds(graph).count(PRODUCT)  # free reshapes around products of maps
    again = copy.deepcopy(graph)
    simplify(again)
    assert again == graph
    made = {node.xnode_union.output_id for node in graph.xnodes}
    assert {tensor_of(value).id_out for value in graph.xvalues} == made | {0}


def copies(graph):
    """The nodes XNNPACK does something for: reshapes of what nothing else reads for one reader are free."""
    reads = Counter(getattr(node.xnode_union, name) for node in graph.xnodes for name in inputs_of(node.xnode_union))
    return [
        node for node in graph.xnodes
        if not isinstance(node.xnode_union, schema.XNNStaticReshape)
        or reads[node.xnode_union.input_id] > 1 or reads[node.xnode_union.output_id] != 1
    ]  # fmt: skip


@pytest.mark.parametrize("rows_are_turned", [True, False])
def test_products_read_a_map_that_was_to_be_copied(rows_are_turned):
    made = Graph(1, 2, 3, 4)
    kept = made.sigmoid(0)
    rows = made.reshape(made.reshape(kept, [1, 6, 4]), [2, 3, 4])
    first = made.transpose(rows, [0, 2, 1]) if rows_are_turned else made.reshape(made.sigmoid(0), [2, 4, 3])
    graph = made.ends(made.sigmoid(made.product(first, rows)), made.sum(kept, kept))
    before = copy.deepcopy(graph)
    simplify(graph)
    product = next(node.xnode_union for node in graph.xnodes if kinds_of(node) == PRODUCT)
    assert (product.input2_id == kept) is not rows_are_turned  # then the copy is needed anyhow
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32)
    assert all(np.array_equal(a, b) for a, b in zip(run(before, x).values(), run(graph, x).values(), strict=True))


def test_to_channels_last_and_back_is_nothing():
    made = Graph(1, 2, 3, 4)
    there = made.transpose(made.sigmoid(0), (0, 3, 1, 2))
    graph = made.ends(made.sigmoid(made.transpose(there, (0, 2, 3, 1))))
    simplify(graph)
    assert kinds(graph) == ["Sigmoid", "Sigmoid"]


def test_an_axis_of_one_moves_for_nothing():
    made = Graph(1, 6, 5)
    graph = made.ends(made.sigmoid(made.transpose(0, (1, 0, 2))))
    simplify(graph)
    assert kinds(graph) == ["StaticReshape", "Sigmoid"]


@pytest.mark.parametrize(("perm", "read"), [((0, 2, 3, 1), [0, 2, 1, 3]), ((0, 1, 3, 2), None)])
def test_a_second_factor_is_moved_in_runs_or_not_at_all(perm, read):
    made = Graph(1, 2, 3, 5)
    keys = made.transpose(made.sigmoid(0), perm)
    batch, *last = made.dims(keys)[1:]
    queries = made.reshape(made.transpose(keys, (0, 1, 3, 2)), [batch, last[1], last[0]])
    graph = made.ends(made.product(queries, made.reshape(made.transpose(made.sigmoid(0), perm), [batch, *last])))
    before = copy.deepcopy(graph)
    simplify(graph)
    product = graph.xnodes[-1].xnode_union
    turns = [node.xnode_union for node in graph.xnodes if kinds_of(node) == "StaticTranspose"]
    made_by = {turn.output_id: turn.perm for turn in turns}
    moved = next(n.xnode_union for n in graph.xnodes if n.xnode_union.output_id == product.input2_id)
    assert product.flags == TRANSPOSED_SECOND and made_by.get(moved.input_id) == read
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 5)).astype(np.float32)
    assert all(np.array_equal(v, run(before, x)[i]) for i, v in run(graph, x).items())


def test_a_value_that_others_read_stays():
    made = Graph(2, 3)
    turned = made.transpose(0, (1, 0))
    graph = made.ends(made.sigmoid(made.transpose(turned, (1, 0))), made.sigmoid(turned))
    before = kinds(graph)
    simplify(graph)
    assert kinds(graph) == before


@pytest.mark.parametrize(("zero_point", "left"), [(3, ["Convert"]), (4, ["Convert", "Convert", "Convert"])])
def test_8_bit_values_are_converted_back_for_other_steps_only(zero_point, left):
    made = Graph(4)
    rounded = made.convert(0, schema.PerTensorQuant(0.1, 3))
    graph = made.ends(
        made.sigmoid(made.reshape(made.convert(made.convert(rounded, None), schema.PerTensorQuant(0.1, zero_point)), [2, 2]))
    )
    simplify(graph)
    assert kinds(graph) == [*left, "StaticReshape", "Sigmoid"]


def test_a_sigmoid_between_conversions_is_of_8_bit_values():
    made = Graph(4)
    rounded = made.convert(0, schema.PerTensorQuant(0.1, 3))
    gate = made.convert(made.sigmoid(made.convert(rounded, None)), SIGMOID)
    graph = made.ends(made.reshape(gate, [2, 2]))
    simplify(graph)
    assert kinds(graph) == ["Convert", "Sigmoid", "StaticReshape"]
    assert graph.xnodes[1].xnode_union.input_id == rounded


def test_equal_constants_are_one_entry():
    made = Graph(2)
    made.graph.constant_data += [schema.ConstantDataOffset(9, 8, name) for name in ("x", "y", "x")]
    for index in (1, 2, 3):
        tensor_of(made.graph.xvalues[made.value([2])]).constant_buffer_idx = index
    channels = schema.PerChannelQuant([], 0, 3, 2)
    last = made.value([2], channels)
    graph = made.ends(made.sum(1, 2))
    simplify(graph)
    assert [c.named_key for c in graph.constant_data] == ["", "x", "y"]
    assert [tensor_of(graph.xvalues[i]).constant_buffer_idx for i in range(4)] == [0, 1, 2, 1]
    assert graph.xvalues[last].xvalue_union.quant_params.scale_buffer_idx == 1


@given(st.sets(st.binary(max_size=20), min_size=2, max_size=2))
def test_names_of_constants_are_short_and_their_own(contents):
    first, second = (name_of(data).hexdigest() for data in contents)
    assert first != second and len(first) == len(second) == 11


def test_executorch_is_left_as_it_was():
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.backends.xnnpack.operators import node_visitor

    def patched():
        return xnnpack_preprocess.serialize_xnnpack_binary, node_visitor.hashlib, node_visitor.NodeVisitor.get_quant_params

    before = patched()
    with pytest.raises(ValueError), xnnpack_graph.simplified():
        assert all(now is not then for now, then in zip(patched(), before))
        raise ValueError
    assert patched() == before


def lowered(model, images, path, monkeypatch, simplifies=True):
    """The artifact and XNNPACK's graph as it is written, or as ExecuTorch writes it by itself."""
    graphs = []
    real = xnnpack_graph.simplify
    monkeypatch.setattr(xnnpack_graph, "simplify", lambda g: (real(g) if simplifies else None, graphs.append(g)))
    if not simplifies:
        monkeypatch.setattr(xnnpack_graph, "nominal", lambda steps: steps)
    artifact = edge_ibtm.lower(model, images, path)
    monkeypatch.undo()
    assert artifact.subgraphs == len(graphs) == 1
    return artifact, graphs[0]


@pytest.mark.parametrize("merger", [None, pytest.param("ibtm", marks=pytest.mark.slow)])
def test_an_8_bit_mobilevit_is_smaller_and_equal(merger, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, images = timm.create_model("mobilevit_xxs", num_classes=5).eval(), torch.randn(1, 3, 64, 64)
    if merger:
        model = edge_ibtm.insert_mergers(model, merger=merger, img_size=64)
    graph = edge_ibtm.quantize(model, [images], scheme="int8")
    whole, before = lowered(graph, images, tmp_path / "whole.pte", monkeypatch, simplifies=False)
    small, after = lowered(graph, images, tmp_path / "small.pte", monkeypatch)
    assert len(after.xnodes) < 0.9 * len(before.xnodes) and small.bytes < whole.bytes
    assert torch.equal(run_pte(small.path, images)[0], run_pte(whole.path, images)[0])
    assert steps_of_biases(after) < 20 < steps_of_biases(before)


def steps_of_biases(graph):
    """How many different ones there are."""
    kind = schema.XNNDatatype.xnn_datatype_qcint32
    biases = [value.xvalue_union for value in graph.xvalues if tensor_of(value).datatype == kind]
    return len({graph.constant_data[bias.quant_params.scale_buffer_idx].named_key for bias in biases})


def test_winograds_places_are_a_mobilevits_pixels(tmp_path, monkeypatch):
    """The map between the first 3 x 3 convolution and the transformer is never put together."""
    torch.manual_seed(0)
    block = timm.create_model("mobilevit_xxs").eval().stages[2][1]
    images = torch.randn(1, 48, 16, 16)
    artifact, graph = lowered(block, images, tmp_path / "block.pte", monkeypatch)
    turned = [node.xnode_union for node in graph.xnodes if kinds_of(node) == "StaticTranspose"]
    to_map = [operator.perm for operator in turned if len(operator.perm) == 5]
    assert to_map == [[2, 0, 3, 1, 4]] * 2  # for the second convolution, and of what it gives
    with torch.no_grad():
        torch.testing.assert_close(run_pte(artifact.path, images)[0], block(images), rtol=1e-4, atol=1e-5)


def kinds_of(node):
    return type(node.xnode_union).__name__.removeprefix("XNN")

"""Between 8-bit layers: SiLU and concatenations are quantized where layers are, and the artifact computes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.mobilevit import MobileVitBlock
from torch import nn

from edge_ibtm import insert_mergers
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.quantize import capture_graph, quantize
from edge_ibtm.quantize_qat import quantize_qat
from edge_ibtm.quantize_sensitivity import sqnr_db
from edge_ibtm.targets import lower
from edge_ibtm.verify import Limits, verify


def gates(graph, quantized):
    """Sigmoids whose output is (or is not) quantized."""
    found = [n for n in graph.graph.nodes if n.target is torch.ops.aten.sigmoid.default]
    return [n for n in found if any(u.name.startswith("quantize_per_tensor") for u in n.users) == quantized]


@pytest.fixture(scope="module")
def mobilevit():
    torch.manual_seed(0)
    model, size = BACKBONES["mobilevit"].twin()
    return model, [torch.randn(1, 3, size, size) for _ in range(8)]


def test_split_is_equal(mobilevit):
    model, batches = mobilevit
    graph = capture_graph(model, batches[0])
    assert gates(graph, False) and not any("silu" in str(n.target) for n in graph.graph.nodes)
    with torch.no_grad():
        assert sqnr_db(model(batches[0]), graph(batches[0])) >= 100


def test_every_silu_behind_a_quantized_layer_is_quantized(mobilevit, tmp_path):
    model, batches = mobilevit
    converted = quantize(model, batches)
    activations = sum(isinstance(m, nn.SiLU) for m in model.modules())
    assert len(gates(converted, True)) == activations and not gates(converted, False)
    images = torch.cat(batches)
    with torch.no_grad():
        assert sqnr_db(model(images), torch.cat([converted(b) for b in batches])) >= 20
    artifact = lower(converted, batches[0], tmp_path / "int8.pte")
    assert artifact.subgraphs == 1
    assert verify(converted, artifact, images, limits=Limits(sqnr_db=28)).ok


def test_silu_costs_little_precision():
    """The sigmoid's 256 steps add less noise than 8-bit input and output have anyhow."""

    class Layer(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.conv, self.activation = nn.Conv2d(8, 32, 3), activation

        def forward(self, x):
            return self.activation(self.conv(x))

    torch.manual_seed(0)
    plain, swish = Layer(nn.Identity()), Layer(nn.SiLU())
    swish.conv.load_state_dict(plain.conv.state_dict())
    x = 5 * torch.randn(1, 8, 24, 24)
    with torch.no_grad():
        linear, quantized = quantize(plain, [x])(x), quantize(swish, [x])(x)
        assert sqnr_db(F.silu(plain(x)), quantized) >= sqnr_db(plain(x), linear) - 3


@pytest.mark.slow
def test_a_layer_left_in_float_keeps_its_silu(mobilevit):
    model, batches = mobilevit
    converted = quantize(model, batches, scheme="mixed", min_sqnr=90.0, most=0.2)
    kept = converted.meta["quantization"].kept_in_float
    float_gates = gates(converted, False)
    assert float_gates and len(float_gates) <= len(kept)
    assert not any("dequantize" in n.args[0].name for n in float_gates)


@pytest.mark.slow
def test_dynamic_leaves_silu_and_convolutions_in_float(mobilevit, tmp_path):
    model, batches = mobilevit
    converted = quantize(model, batches, scheme="int8_dynamic")
    assert not gates(converted, True)
    convolutions = converted.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    assert convolutions and all(node.args[1].op == "get_attr" for node in convolutions)
    artifact = lower(converted, batches[0], tmp_path / "dynamic.pte")
    assert verify(converted, artifact, torch.cat(batches), limits=Limits(sqnr_db=28)).ok


def concatenations(graph):
    """Of all concatenations, how many take 8-bit values and how many do not."""
    found = [n for n in graph.graph.nodes if n.target is torch.ops.aten.cat.default]
    taken = sum(any("dequantize" in i.name for i in n.all_input_nodes) for n in found)
    return taken, len(found) - taken


@pytest.mark.slow
def test_concatenations_of_quantized_layers_only(mobilevit):
    model, batches = mobilevit
    assert concatenations(quantize(model, batches)) == (sum(isinstance(m, MobileVitBlock) for m in model.modules()), 0)
    torch.manual_seed(0)
    for family in ("swin", "mobilevit"):
        model, size = BACKBONES[family].twin()
        before = concatenations(quantize(model, [torch.randn(1, 3, size, size)]))
        insert_mergers(model, merger="ibtm", keep_ratio=0.7)
        after = concatenations(quantize(model, [torch.randn(1, 3, size, size)]))
        assert after[0] == before[0] and after[1] >= before[1], "rolls and merge sites stay in float"


@pytest.mark.slow
def test_qat_quantizes_silu(mobilevit):
    model, batches = mobilevit
    converted = quantize_qat(model, batches, lambda module: None, batch_size=2)
    assert gates(converted, True) and not gates(converted, False)
    with torch.no_grad():
        assert sqnr_db(model(batches[0]), converted(batches[0])) >= 20


@pytest.mark.parametrize("family", ["mobilevit", "vit"])
def test_means_that_decide_what_merges_stay_in_float(family):
    torch.manual_seed(0)
    model, size = BACKBONES[family].twin()
    insert_mergers(model, merger="ibtm", img_size=size)
    batches = [torch.randn(1, 3, size, size) for _ in range(2)]
    float_means = [n for n in capture_graph(model, batches[0]).graph.nodes if n.target is torch.ops.aten.mean.dim]
    means = [n for n in quantize(model, batches, scheme="int8").graph.nodes if n.target is torch.ops.aten.mean.dim]
    rounded = [n for n in means if any(u.name.startswith("quantize_per_tensor") for u in n.users)]
    assert len(means) == len(float_means) and len(rounded) == (family == "mobilevit")  # timm's own, before the classifier

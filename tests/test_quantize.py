"""Quantization on tiny models: what is quantized, what stays in float, and that the artifact computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from edge_ibtm import insert_mergers
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.quantize import _convert, _linear, capture_graph, quantize, quantizer
from edge_ibtm.quantize_qat import quantize_qat
from edge_ibtm.quantize_sensitivity import LayerNoise, affordable, fake_activation, fake_tokens, fake_weight, sqnr_db
from edge_ibtm.quantize_smooth import smooth_norms
from edge_ibtm.rewrite_graph import pads_as_concatenations
from edge_ibtm.targets import lower
from edge_ibtm.verify import Limits, verify

QUANTIZED = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model, size = BACKBONES["vit"].twin()
    with torch.no_grad():
        model.head.weight.normal_()
    return model, [torch.randn(1, 3, size, size) for _ in range(8)]


def layers(graph, quantized):
    """Products with weights, those whose weight is (or is not) dequantized."""
    found = [n for n in graph.graph.nodes if n.target in QUANTIZED]
    return [n for n in found if ("dequantize" in str(getattr(n.args[1], "target", ""))) == quantized]


def test_static_int8(vit, tmp_path):
    model, batches = vit
    converted = quantize(model, batches)
    images = torch.cat(batches)
    with torch.no_grad():
        assert sqnr_db(model(images), torch.cat([converted(b) for b in batches])) >= 20
    assert len(layers(converted, True)) == sum(type(m) in (nn.Linear, nn.Conv2d) for m in model.modules()) + 2 * 2
    assert all(n.args[1].meta["val"].shape[0] == 1 for n in layers(converted, False))
    small = lower(converted, batches[0], tmp_path / "int8.pte")
    assert verify(converted, small, images, limits=Limits(sqnr_db=28)).ok
    assert small.bytes < 0.75 * lower(model, batches[0], tmp_path / "fp32.pte").bytes
    assert small.subgraphs == 1


def test_merge_sites_stay_in_float():
    torch.manual_seed(1)
    model, size = BACKBONES["vit"].twin()
    insert_mergers(model, merger="ibtm", keep_ratio=0.7)
    batches = [torch.randn(1, 3, size, size) for _ in range(4)]
    converted = quantize(model, batches)
    for node in layers(converted, True):
        types = [str(t) for _, t in (node.meta.get("nn_module_stack") or {}).values()]
        assert not any("mergers" in t or "edge_ibtm.site" in t for t in types)
    kinds = {str(n.target) for n in converted.graph.nodes if any("quantize_per_tensor" in str(u.target) for u in n.users)}
    assert not any("clamp" in k or "bmm" in k or "maximum" in k for k in kinds)
    with torch.no_grad():
        assert torch.isfinite(converted(batches[0])).all()


def test_dynamic_int8_quantizes_linear_layers(vit):
    model, batches = vit
    converted = quantize(model, batches, scheme="int8_dynamic")
    assert any("choose_qparams" in str(n.target) for n in converted.graph.nodes)
    with torch.no_grad():
        assert sqnr_db(model(batches[0]), converted(batches[0])) >= 20


def test_the_embedding_of_patches_stays_in_float_where_activations_are_measured(vit):
    model, batches = vit
    converted = quantize(model, batches, scheme="int8_dynamic")
    patches = model.patch_embed.proj.weight.flatten(1).shape
    float_weights = [tuple(n.args[1].meta["val"].shape) for n in layers(converted, False)]
    assert tuple(patches) in float_weights
    wide = [shape for shape in float_weights if shape[0] > 1]
    assert wide == [tuple(patches)], "what has more than one output and reads no image is in 8 bits"


@pytest.mark.parametrize("name, scheme", [("vit", "int8_dynamic"), ("mobilevit", "int8")])
def test_mixed_is_built_on_what_auto_chooses(name, scheme):
    torch.manual_seed(0)
    model, size = BACKBONES[name].twin()
    converted = quantize(model, [torch.randn(1, 3, size, size) for _ in range(4)], scheme="mixed", min_sqnr=0.0)
    assert converted.meta["quantization"].scheme == scheme
    assert any("choose_qparams" in str(n.target) for n in converted.graph.nodes) == (scheme == "int8_dynamic")


def test_mixed_leaves_in_float_what_costs_most_for_its_size(vit):
    model, batches = vit
    plain = quantize(model, batches, scheme="mixed", min_sqnr=0.0)
    assert plain.meta["quantization"].kept_in_float == ()
    choice = quantize(model, batches, scheme="mixed", min_sqnr=90.0, most=0.25).meta["quantization"]
    price = [layer.per_weight for layer in choice.kept_in_float]
    assert 1 < len(price) < choice.layers and price == sorted(price, reverse=True)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    assert sum(layer.weights for layer in choice.kept_in_float) <= 0.25 * linear
    assert choice.sqnr_db > choice.all_int8_db
    assert choice.kept_in_float[0].path in str(choice) and "left in float" in str(choice)


def test_affordable_skips_a_layer_that_is_too_large():
    layers = [LayerNoise(name, name, 30.0, weights) for name, weights in (("a", 10), ("b", 900), ("c", 40), ("d", 50))]
    assert [layer.path for layer in affordable(layers, 0.06)] == ["a", "c"]


def test_fake_quantization():
    w = torch.tensor([[1.0, -0.5], [100.0, 3.0]])
    assert torch.allclose(fake_weight(w)[0], w[0], atol=0.5 / 127) and (fake_weight(w)[1] - w[1]).abs().max() < 0.5
    x = torch.linspace(-1, 3, 1000)
    assert (fake_activation(x) - x).abs().max() <= 4 / 255 and fake_activation(x).unique().numel() <= 256
    tokens = torch.tensor([[1.0, -0.5, 0.25], [1000.0, 3.0, 5.0]])
    assert torch.allclose(fake_tokens(tokens)[0], tokens[0], atol=0.5 * 1.5 / 255), "a token's levels are its own"
    assert (fake_tokens(tokens)[1] - tokens[1]).abs().max() <= 0.5 * 1000 / 255 + 1e-3
    assert sqnr_db(x, x) == 200.0 and sqnr_db(x, 0.9 * x) == pytest.approx(20, abs=1e-3)


def test_qat_trains_and_converts(vit):
    model, batches = BACKBONES["vit"].twin()[0], vit[1]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, labels = torch.cat(batches), torch.arange(8) % 5
    losses = []

    def finetune(module):
        module.train()
        optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
        for _ in range(10):
            for i in (0, 4):
                loss = F.cross_entropy(module(images[i : i + 4]), labels[i : i + 4])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss))

    converted = quantize_qat(model, batches, finetune, batch_size=4)
    assert losses[-1] + losses[-2] < losses[0] + losses[1]
    with torch.no_grad():
        trained = F.cross_entropy(torch.cat([converted(b) for b in batches]), labels)
        assert trained < F.cross_entropy(model(images), labels)
    assert layers(converted, True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(UsageError, match="do not fill"):
        quantize_qat(model, batches, finetune, batch_size=9)


def test_bad_requests(vit):
    model, batches = vit
    with pytest.raises(UsageError, match="int8"):
        quantize(model, batches, scheme="int9")
    with pytest.raises(UsageError, match="at least one"):
        quantize(model, [])
    with pytest.raises(UsageError, match="tensor of images"):
        quantize(model, [["cat.jpg"]])
    with pytest.raises(UsageError, match=r"one tensor \(\d+, 3, 32, 32\); give a list of batches"):
        quantize(model, batches[0])
    with pytest.raises(UsageError, match=r"of shape \(0, 3, 32, 32\) holds no image"):
        quantize(model, [batches[0][:0]])
    with pytest.raises(UsageError, match="must be floating point, got torch.uint8 .* normalise"):
        quantize(model, [torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
    for calibration in (None, 3):
        with pytest.raises(UsageError, match=f"calibration is {calibration}; give a list of batches"):
            quantize(model, calibration)
    with pytest.raises(UsageError, match=r"has shape \(3, 32, 32\); give images \[B, 3, H, W\]"):
        quantize(model, [batches[0][0]])
    with pytest.raises(UsageError, match="'int8' has no option min_sqnr; leave it out"):
        quantize(model, batches, min_sqnr=3)
    with pytest.raises(UsageError, match="'mixed' has no option mots; it has min_sqnr, most"):
        quantize(model, batches, scheme="mixed", mots=3)
    with pytest.raises(UsageError, match="NaN or infinity"):
        quantize(model, [batches[0], batches[0] * float("nan")])
    with pytest.raises(UsageError, match=r"several shapes, \[\(3, 32, 32\), \(3, 48, 48\)\]"):
        quantize(model, [batches[0], torch.randn(1, 3, 48, 48)])
    with pytest.raises(EdgeIBTMError, match=r"torch.export of \w+ on \(1, 2, 32, 32\) failed"):
        quantize(model, [torch.randn(1, 2, 32, 32)])
    with pytest.raises(UsageError, match="most=2, min_sqnr=30"):
        quantize(model, batches, scheme="mixed", most=2)


def test_a_graph_of_another_batch_size_says_what_to_calibrate_with(vit, tmp_path):
    model, images = vit
    graph = quantize(model, [torch.cat(images[:2])])
    with pytest.raises(UsageError, match=r"captured for inputs of \[\(2, 3, .*got \[\(1, 3, .*split\(1\)"):
        lower(graph, images[0], tmp_path / "a.pte")
    assert not list(tmp_path.iterdir())


def test_auto_takes_a_model_without_weights():
    assert "int8" in quantize(nn.ReLU(), [torch.randn(1, 3, 4, 4)], scheme="auto").meta["quantization"]


@pytest.mark.parametrize("pads", [[0, 0, 0, 2, 1, 0], [1, 2], [0, 0, 0, 0]])
def test_padding_written_as_a_concatenation_is_equal(pads):
    class Padded(nn.Module):
        def forward(self, x):
            return F.pad(x, pads) * 2.0

    x = torch.randn(1, 3, 4, 5)
    graph = torch.export.export(Padded(), (x,)).module()
    pads_as_concatenations(graph)
    assert torch.equal(graph(x), Padded()(x))
    assert not any("pad" in str(n.target) for n in graph.graph.nodes if n.op == "call_function")


@pytest.mark.slow
@pytest.mark.parametrize("side", [56, 48])
def test_a_swin_that_pads_its_windows_loads_in_int8(side, tmp_path):
    torch.manual_seed(0)
    options = {"patch_size": 4, "window_size": 7, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 5}
    model = SwinTransformer(img_size=side, **options).eval()
    images = torch.randn(4, 3, side, side)
    artifact = lower(quantize(model, [images[:1]]), images[:1], tmp_path / "swin.pte")
    assert verify(model, artifact, images).sqnr_db > 5


def test_padding_with_something_else_is_left():
    class Padded(torch.nn.Module):
        def forward(self, x):
            return F.pad(x, (1, 1), value=-2.0)

    x = torch.randn(1, 3, 4, 5)
    graph = torch.export.export(Padded(), (x,)).module()
    pads_as_concatenations(graph)
    assert torch.equal(graph(x), Padded()(x))


def test_auto_measures_activations_of_what_is_all_linear(vit):
    from edge_ibtm import build_model

    model, batches = vit
    graph = quantize(model, batches, scheme="auto")
    assert "int8_dynamic" in graph.meta["quantization"]
    assert any("choose_qparams" in str(n.target) for n in graph.graph.nodes)
    graph = quantize(build_model("mobilevit_xxs", num_classes=3), [torch.randn(1, 3, 64, 64)], scheme="auto")
    assert graph.meta["quantization"].startswith("int8, as linear layers hold")


class Normed(nn.Module):
    """A LayerNorm and a linear layer on tokens [B, 64, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x):
        return self.fc(self.norm(x.reshape(x.shape[0], 64, 32)))


def test_smoothing_changes_no_value_and_makes_channels_alike():
    """One feature far larger than the others: 8 bits lose those, smoothed they do not."""
    torch.manual_seed(0)
    model, batches = Normed().eval(), [torch.randn(1, 64, 32) for _ in range(4)]
    with torch.no_grad():
        model.fc.weight[:, 0] /= 30
        for batch in batches:
            batch[..., 0] *= 30
        wanted = torch.cat([model(b) for b in batches])
        graph = capture_graph(model, batches[0])
        assert smooth_norms(graph, batches, _linear) == 1
        assert sqnr_db(wanted, torch.cat([graph(b) for b in batches])) > 100
        smoothed = quantize(model, batches, scheme="int8_dynamic")
        rough = _convert(capture_graph(model, batches[0]), batches[:1], quantizer(dynamic=True, keep=_linear))
        found = [sqnr_db(wanted, torch.cat([g(b) for b in batches])) for g in (smoothed, rough)]
    assert found[0] > found[1] + 3, found


@pytest.mark.slow
@pytest.mark.parametrize("merger", [None, "ibtm"])
@pytest.mark.parametrize("options", [{"scheme": "int8_dynamic"}, {"scheme": "mixed", "min_sqnr": 90.0, "most": 0.3}], ids=str)
def test_a_swin_with_dynamic_activations_is_one_subgraph(options, merger, tmp_path):
    model, size = BACKBONES["swin"].twin()
    if merger:
        insert_mergers(model, merger=merger, keep_ratio=0.7)
    x = torch.randn(1, 3, size, size)
    assert lower(quantize(model, [x], **options), x, tmp_path / "swin.pte").subgraphs == 1

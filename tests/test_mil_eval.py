"""The ML Program evaluator: every operation against coremltools' own value inference or torch, and its faults."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_ibtm.errors import CannotRunHere, UsageError
from edge_ibtm.targets.coreml import run_mlpackage
from edge_ibtm.targets.coreml_package import class_labels
from edge_ibtm.targets.coreml_tools import quiet_coremltools
from edge_ibtm.targets.mil_args import Args, stored
from edge_ibtm.targets.mil_eval import KNOWN, OPERATIONS, load_program

with quiet_coremltools():
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
Y = RNG.normal(size=(2, 3, 4)).astype(np.float32)
POSITIVE = np.abs(X) + np.float32(0.5)
INTS = np.array([[2, 0, 1], [1, 1, 0]], dtype=np.int32)

# operation -> inputs; coremltools evaluates these itself when every input is constant
INFERRED: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"x": X}) for name in ("abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "sign", "sin")],
    *[(name, {"x": X}) for name in ("square", "tanh", "relu", "relu6", "sigmoid", "softplus", "softsign", "round")],
    ("sqrt", {"x": POSITIVE}),
    ("log", {"x": POSITIVE, "epsilon": 0.25}),
    ("rsqrt", {"x": POSITIVE, "epsilon": 0.25}),
    ("inverse", {"x": POSITIVE, "epsilon": 0.25}),
    ("clip", {"x": X, "alpha": -0.5, "beta": 0.25}),
    ("threshold", {"x": X, "alpha": 0.1}),
    ("elu", {"x": X, "alpha": 0.7}),
    ("leaky_relu", {"x": X, "alpha": 0.2}),
    ("linear_activation", {"x": X, "alpha": 2.0, "beta": -1.0}),
    ("sigmoid_hard", {"x": X, "alpha": 0.3, "beta": 0.4}),
    ("thresholded_relu", {"x": X, "alpha": 0.3}),
    ("clamped_relu", {"x": X, "alpha": 0.1, "beta": 0.6}),
    ("prelu", {"x": X[None], "alpha": np.array([0.1, 0.3], np.float32)}),
    *[(name, {"x": X, "y": Y}) for name in ("add", "sub", "mul", "real_div", "maximum", "minimum")],
    *[(name, {"x": X, "y": Y}) for name in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")],
    ("floor_div", {"x": X, "y": Y}),
    ("mod", {"x": X, "y": Y}),
    ("pow", {"x": POSITIVE, "y": Y}),
    *[(name, {"x": X > 0, "y": Y > 0}) for name in ("logical_and", "logical_or", "logical_xor")],
    ("logical_not", {"x": X > 0}),
    ("select", {"cond": X > 0, "a": X, "b": Y}),
    *[
        (f"reduce_{name}", {"x": POSITIVE, "axes": [1, -1], "keep_dims": True})
        for name in ("sum", "mean", "max", "min")
    ],
    *[(f"reduce_{name}", {"x": X, "axes": [1], "keep_dims": False}) for name in ("prod", "l1_norm", "l2_norm")],
    *[(f"reduce_{name}", {"x": POSITIVE, "axes": [2]}) for name in ("sum_square", "log_sum", "log_sum_exp")],
    ("reduce_argmax", {"x": X, "axis": 1, "keep_dims": False}),
    ("reduce_argmin", {"x": X, "axis": -1, "keep_dims": True}),
    ("softmax", {"x": X, "axis": 1}),
    ("matmul", {"x": X, "y": Y, "transpose_x": False, "transpose_y": True}),
    ("linear", {"x": X, "weight": Y[0], "bias": Y[0, :, 0]}),
    ("reshape", {"x": X, "shape": [4, -1]}),
    ("transpose", {"x": X, "perm": [2, 0, 1]}),
    ("squeeze", {"x": X[:, :1], "axes": [1]}),
    ("expand_dims", {"x": X, "axes": [0, -1]}),
    ("slice_by_index", {"x": X, "begin": [0, 1, 3], "end": [2, 3, 0], "stride": [1, 1, -2]}),
    ("slice_by_index", {"x": X, "begin": [1, 0, 0], "end": [2, 2, 4], "squeeze_mask": [True, False, False]}),
    ("slice_by_index", {"x": X, "begin": [0, -2, 0], "end": [0, 0, -1], "end_mask": [True, True, False]}),
    ("pad", {"x": X, "pad": [0, 0, 1, 2, 2, 1], "mode": "constant", "constant_val": 3.0}),
    ("pad", {"x": X, "pad": [1, 2], "mode": "reflect"}),
    ("concat", {"values": [X, Y], "axis": 1}),
    ("stack", {"values": [X, Y], "axis": 2}),
    ("split", {"x": X, "split_sizes": [1, 2], "axis": 1}),
    ("split", {"x": X, "num_splits": 2, "axis": 2}),
    ("tile", {"x": X, "reps": [1, 2, 3]}),
    ("fill", {"shape": [2, 3], "value": 1.5}),
    ("range_1d", {"start": 1, "end": 9, "step": 3}),
    ("band_part", {"x": X, "lower": 0, "upper": 1}),
    ("flatten2d", {"x": X, "axis": 2}),
    ("shape", {"x": X}),
    ("gather", {"x": X, "indices": np.array([[2, 0], [-1, 1]], np.int32), "axis": 1}),
    ("gather_along_axis", {"x": X[0], "indices": np.array([[2, 0, 1, 1], [0, 0, 2, 2]], np.int32), "axis": 0}),
    ("cumsum", {"x": X, "axis": 1, "exclusive": False, "reverse": False}),
    ("topk", {"x": X, "k": 2, "axis": 1}),
    ("topk", {"x": X, "k": 2, "axis": -1, "ascending": True}),
    ("argsort", {"x": X, "axis": 1, "ascending": True}),
    ("cast", {"x": X * 3, "dtype": "int32"}),
]


def as_torch(value: Any) -> Any:
    """A test input as the evaluator would hold it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and isinstance(value[0], np.ndarray):
        return [torch.from_numpy(v) for v in value]
    return torch.as_tensor(np.asarray(value))


def inferred(kind: str, inputs: dict[str, Any], opset: Any = None) -> list[tuple[np.ndarray, str]]:
    """What coremltools itself computes for constant inputs, with the types of the outputs."""
    answer: list[tuple[np.ndarray, str]] = []

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=opset or ct.target.iOS17)
    def program(unused: Any) -> Any:
        result = getattr(mb, kind)(**inputs)
        for var in result if isinstance(result, (list, tuple)) else [result]:
            answer.append((var.val, types.builtin_to_string(var.dtype)))
        return unused

    return answer


def evaluated(kind: str, inputs: dict[str, Any], dtypes: tuple[str, ...] = ("fp32",)) -> list[torch.Tensor]:
    """What the evaluator's table computes."""
    args = Args(kind, {k: as_torch(v) for k, v in inputs.items()}, dtypes)
    result = OPERATIONS[kind](args)
    outputs = result if isinstance(result, tuple) else (result,)
    return [stored(value, dtype) for value, dtype in zip(outputs, dtypes)]


@pytest.mark.parametrize("kind,inputs", INFERRED, ids=[f"{k}-{i}" for i, (k, _) in enumerate(INFERRED)])
def test_operation_equals_coremltools(kind: str, inputs: dict[str, Any]) -> None:
    wanted = inferred(kind, inputs)
    if any(value is None for value, _ in wanted):
        pytest.skip(f"coremltools does not infer the value of {kind}")
    got = evaluated(kind, inputs, tuple(dtype for _, dtype in wanted))
    assert len(got) == len(wanted)
    for (value, _), tensor in zip(wanted, got):
        assert tuple(tensor.shape) == np.shape(value)
        np.testing.assert_allclose(tensor.numpy(), value, rtol=2e-5, atol=2e-6)


def test_enough_of_the_table_is_compared() -> None:
    compared = [kind for kind, inputs in INFERRED if all(value is not None for value, _ in inferred(kind, inputs))]
    assert len(set(compared)) >= 55


IMAGE = torch.from_numpy(RNG.normal(size=(2, 4, 7, 6)).astype(np.float32))
WEIGHT = torch.from_numpy(RNG.normal(size=(8, 2, 3, 3)).astype(np.float32))
KEYS = torch.from_numpy(RNG.normal(size=(2, 5, 4)).astype(np.float32))


def run(kind: str, dtypes: tuple[str, ...] = ("fp32",), **inputs: Any) -> torch.Tensor:
    return evaluated(kind, inputs, dtypes)[0]


def close(got: torch.Tensor, wanted: Any) -> None:
    np.testing.assert_allclose(got.numpy(), np.asarray(wanted), rtol=1e-5, atol=1e-5)


def test_convolution_paddings() -> None:
    common = {"x": IMAGE, "weight": WEIGHT, "groups": 2}
    close(run("conv", **common, pad_type="custom", pad=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]),
          F.conv2d(F.pad(IMAGE, [2, 1, 1, 0]), WEIGHT, None, (2, 1), 0, (1, 2), 2))  # fmt: skip
    close(run("conv", **common, pad_type="valid"), F.conv2d(IMAGE, WEIGHT, groups=2))
    close(run("conv", **common, pad_type="same"), F.conv2d(IMAGE, WEIGHT, padding=1, groups=2))
    same = run("conv", **common, pad_type="same", strides=[2, 2])
    close(same, F.conv2d(F.pad(IMAGE, [0, 1, 1, 1]), WEIGHT, None, 2, groups=2))  # width 6: the odd pixel goes after
    lower = run("conv", **common, pad_type="same_lower", strides=[2, 2])
    close(lower, F.conv2d(F.pad(IMAGE, [1, 0, 1, 1]), WEIGHT, None, 2, groups=2))
    line = run("conv", x=IMAGE[:, :2, 0], weight=WEIGHT[:, :, 0], pad_type="valid")
    close(line, F.conv1d(IMAGE[:, :2, 0], WEIGHT[:, :, 0]))


def test_pooling() -> None:
    window = {"x": IMAGE, "kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}
    close(run("max_pool", **window), F.max_pool2d(IMAGE, 3, 2, 1))
    close(run("avg_pool", **window), F.avg_pool2d(IMAGE, 3, 2, 1))
    close(run("avg_pool", **window, exclude_padding_from_average=True),
          F.avg_pool2d(IMAGE, 3, 2, 1, count_include_pad=False))  # fmt: skip
    close(run("max_pool", **window, ceil_mode=True), F.max_pool2d(IMAGE, 3, 2, 1, ceil_mode=True))


def test_normalisations() -> None:
    mean, variance, gamma, beta = IMAGE.mean((0, 2, 3)), IMAGE.var((0, 2, 3)), torch.arange(4.0), torch.ones(4)
    batch = run("batch_norm", x=IMAGE, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-3)
    close(batch, F.batch_norm(IMAGE, mean, variance, gamma, beta, eps=1e-3))
    layer = run("layer_norm", x=KEYS, axes=[-1], gamma=gamma, beta=beta, epsilon=1e-3)
    close(layer, F.layer_norm(KEYS, (4,), gamma, beta, 1e-3))
    channels = run("layer_norm", x=IMAGE, axes=[1], gamma=gamma, epsilon=1e-6)
    close(channels, F.layer_norm(IMAGE.movedim(1, -1), (4,), gamma, None, 1e-6).movedim(-1, 1))
    close(run("instance_norm", x=IMAGE, epsilon=1e-5), F.instance_norm(IMAGE))
    close(run("l2_norm", x=IMAGE, epsilon=1e-12), IMAGE / IMAGE.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def test_activations_and_attention() -> None:
    close(run("silu", x=KEYS), F.silu(KEYS))
    close(run("gelu", x=KEYS, mode="EXACT"), F.gelu(KEYS))
    close(run("gelu", x=KEYS, mode="TANH_APPROXIMATION"), F.gelu(KEYS, approximate="tanh"))
    close(run("gelu", x=KEYS, mode="SIGMOID_APPROXIMATION"), KEYS * torch.sigmoid(1.702 * KEYS))
    mask = torch.tensor([True, False, True, True, True])
    wanted = F.scaled_dot_product_attention(KEYS, KEYS, KEYS, attn_mask=mask)
    close(run("scaled_dot_product_attention", query=KEYS, key=KEYS, value=KEYS, attn_mask=mask), wanted)


@pytest.mark.parametrize("mode", ["update", "add", "sub", "mul", "div", "max", "min"])
def test_scatters_agree_with_numpy(mode: str) -> None:
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum,
                 "min": np.minimum, "update": lambda _old, new: new}  # fmt: skip
    data, updates = POSITIVE[0].copy(), np.abs(Y[0, :2]) + np.float32(0.5)
    rows = data.copy()
    for position, update in zip((2, 0), updates):
        rows[position] = functions[mode](rows[position], update)
    along = np.array([[2] * 4, [0] * 4], np.int32)
    close(run("scatter", data=data, indices=np.array([-1, 0]), updates=updates, axis=0, mode=mode), rows)
    close(run("scatter_along_axis", data=data, indices=along, updates=updates, axis=0, mode=mode), rows)
    close(run("scatter_nd", data=data, indices=np.array([[2], [0]]), updates=updates, mode=mode), rows)


def test_gathers_with_shared_axes() -> None:
    picked = run("gather", x=X, indices=INTS, axis=1, batch_dims=1)
    close(picked, np.stack([X[b][INTS[b]] for b in range(2)]))
    close(run("gather_nd", x=X, indices=np.array([[1, 2], [0, 0]])), np.stack([X[1, 2], X[0, 0]]))
    close(run("gather_nd", x=X, indices=np.array([[[2]], [[0]]]), batch_dims=1), np.stack([X[0, 2:3], X[1, 0:1]]))


def test_positions_and_sums() -> None:
    close(run("one_hot", indices=INTS, one_hot_vector_size=3, axis=-1, on_value=2.0, off_value=-1.0),
          np.eye(3)[INTS] * 3 - 1)  # fmt: skip
    close(run("one_hot", indices=INTS, one_hot_vector_size=3, axis=1), np.eye(3)[INTS].swapaxes(1, 2))
    close(run("cumsum", x=X, axis=1, exclusive=True), X.cumsum(1) - X)
    close(run("cumsum", x=X, axis=1, reverse=True), X[:, ::-1].cumsum(1)[:, ::-1])
    close(run("reverse", x=X, axes=[1]), X[:, ::-1])
    ties = evaluated("topk", {"x": np.array([1.0, 3.0, 3.0, 2.0], np.float32), "k": 3, "axis": 0}, ("fp32", "int32"))
    assert ties[1].tolist() == [1, 2, 3]
    update = run("slice_update", x=X, update=Y[:, :1], begin=[0, 1, 0], end=[2, 2, 4])
    close(update, np.concatenate([X[:, :1], Y[:, :1], X[:, 2:]], 1))


def test_space_and_depth() -> None:
    image = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    deep = run("space_to_depth", x=image, block_size=2)
    assert deep.shape == (1, 8, 2, 3)
    assert deep[0, 0].tolist() == image[0, 0, ::2, ::2].tolist() and deep[0, 2, 0, 0] == image[0, 0, 0, 1]
    close(run("depth_to_space", x=deep, block_size=2), image)
    close(run("pixel_shuffle", x=deep, upscale_factor=2), F.pixel_shuffle(deep, 2))


def test_quantize_and_dequantize() -> None:
    scale, zero = np.array([0.5, 0.25, 1.0], np.float32), np.array([0, 3, -2], np.int8)
    inputs = {"input": X * 100, "scale": scale, "zero_point": zero, "axis": 1}
    whole = run("quantize", ("int8",), **inputs)
    wanted = np.clip(np.round(X * 100 / scale[:, None]) + zero[:, None], -128, 127)
    assert whole.dtype == torch.int8 and np.array_equal(whole.numpy(), wanted)
    back = run("dequantize", input=whole.numpy(), scale=scale, zero_point=zero, axis=1)
    close(back, (wanted - zero[:, None]) * scale[:, None])
    close(run("dequantize", input=whole.numpy(), scale=np.float32(0.5)), wanted * 0.5)


def test_half_precision_rounds_and_overflows() -> None:
    assert float(stored(torch.tensor(1.0001), "fp16")) == 1.0
    assert float(stored(torch.tensor(70000.0), "fp16")) == float("inf")
    assert float(stored(torch.tensor(1.0001), "fp32")) == pytest.approx(1.0001)


def saved(path: Any, body: Any, shape: tuple[int, ...] = (1, 3, 4, 4), **options: Any) -> str:
    """A package of one hand-written program."""
    with quiet_coremltools():
        program = mb.program(input_specs=[mb.TensorSpec(shape=shape)], opset_version=ct.target.iOS17)(body)
        options = {"compute_precision": ct.precision.FLOAT32, "minimum_deployment_target": ct.target.iOS17, **options}
        ct.convert(program, convert_to="mlprogram", skip_model_load=True, **options).save(str(path))
    return str(path)


def test_program_runs_in_its_own_precision(tmp_path: Any) -> None:
    def body(x: Any) -> Any:
        return mb.sub(x=mb.add(x=x, y=np.float32(2048.0)), y=np.float32(2048.0))

    x = torch.full((1, 3, 4, 4), 0.75)
    single = saved(tmp_path / "single.mlpackage", body)
    half = saved(tmp_path / "half.mlpackage", body, compute_precision=ct.precision.FLOAT16)
    assert torch.equal(run_mlpackage(single, x), x)
    assert torch.equal(run_mlpackage(half, x), torch.zeros_like(x))  # halves are 2 apart above 2048


def test_unknown_operations_are_all_named(tmp_path: Any) -> None:
    def body(x: Any) -> Any:
        return mb.non_zero(x=mb.resize_bilinear(x=mb.acos(x=x), target_size_height=8, target_size_width=8))

    path = saved(tmp_path / "foreign.mlpackage", body)
    with pytest.raises(CannotRunHere, match=r"acos \(1\), non_zero \(1\), resize_bilinear \(1\)"):
        load_program(path)
    assert "acos" not in KNOWN


def test_own_classifier_equals_coremltools(tmp_path: Any) -> None:
    """The `classify` operation that edge_ibtm writes is the one coremltools writes."""
    from edge_ibtm.targets.coreml_classify import add_classifier
    from edge_ibtm.targets.coreml_package import PackageText, open_package, operations, save_package

    def scores(x: Any) -> Any:
        return mb.softmax(x=mb.reduce_mean(x=x, axes=[2, 3], keep_dims=False), axis=-1, name="probabilities")

    def logits(x: Any) -> Any:
        return mb.reduce_mean(x=x, axes=[2, 3], keep_dims=False, name="logits")

    names = ["cat", "dog", "a bird"]
    theirs = saved(tmp_path / "theirs.mlpackage", scores, classifier_config=ct.ClassifierConfig(names))
    plain = open_package(saved(tmp_path / "plain.mlpackage", logits))
    save_package(plain, tmp_path / "ours.mlpackage", PackageText({}, names))
    specs = [open_package(p).get_spec() for p in (theirs, tmp_path / "ours.mlpackage")]
    written = [next(op for op in operations(spec) if op.type == "classify") for spec in specs]
    assert written[0].inputs["classes"] == written[1].inputs["classes"]
    assert [o.type for o in written[0].outputs] == [o.type for o in written[1].outputs]
    assert [o.type for o in specs[0].description.output] == [o.type for o in specs[1].description.output][1:]
    assert class_labels(specs[0]) == class_labels(specs[1]) == names
    x = torch.randn(1, 3, 4, 4)
    outputs = load_program(tmp_path / "ours.mlpackage").run({"x": x})
    assert outputs["classLabel"] == names[int(x.mean((2, 3)).argmax())]
    close(torch.tensor(list(outputs["classLabel_probs"].values())), torch.softmax(x.mean((2, 3)), 1)[0])
    close(run_mlpackage(theirs, x), torch.softmax(x.mean((2, 3)), 1))
    with pytest.raises(UsageError, match="no output named"):
        add_classifier(specs[0], names)


def test_wrong_shape_and_kind_of_input(tmp_path: Any) -> None:
    path = saved(tmp_path / "one.mlpackage", lambda x: mb.relu(x=x))
    with pytest.raises(UsageError, match=r"\[1, 3, 4, 4\].*\[2, 3, 8, 8\]"):
        run_mlpackage(path, torch.zeros(2, 3, 8, 8))
    with pytest.raises(UsageError, match="bytes"):
        run_mlpackage(path, torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("space,flipped", [("RGB", False), ("BGR", True)])
def test_image_inputs_follow_their_colour_layout(tmp_path: Any, space: str, flipped: bool) -> None:
    image = ct.ImageType(
        "x", shape=(1, 3, 4, 4), color_layout=getattr(ct.colorlayout, space), scale=0.5, bias=[1, 2, 3]
    )
    path = saved(tmp_path / "image.mlpackage", lambda x: mb.identity(x=x), inputs=[image])
    bytes_in = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    wanted = (bytes_in.flip(1) if flipped else bytes_in) * 0.5 + torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1)
    assert torch.equal(run_mlpackage(path, bytes_in), wanted)
    with pytest.raises(UsageError, match="give uint8 images"):
        run_mlpackage(path, torch.zeros(1, 3, 4, 4))

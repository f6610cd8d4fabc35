"""MIL operations: elementwise arithmetic, comparisons, activations, reductions, quantization."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from edge_ibtm.targets.mil_args import TORCH_TYPES, Args, Operation


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Operation:
    return lambda a: function(a["x"])


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Operation:
    return lambda a: function(torch.as_tensor(a["x"]), torch.as_tensor(a["y"]))


def _reduce(function: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> Operation:
    def run(a: Args) -> torch.Tensor:
        axes = a.ints("axes") or list(range(a["x"].dim()))
        return function(a["x"], axes, a.flag("keep_dims"))

    return run


def _arg_reduce(function: Callable[..., torch.Tensor]) -> Operation:
    return lambda a: function(a["x"], dim=a.int("axis", -1), keepdim=a.flag("keep_dims"))


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((ax % x.dim() for ax in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def clip(a: Args) -> torch.Tensor:
    """x limited to [alpha, beta]."""
    return torch.clamp(a["x"], a.float("alpha"), a.float("beta"))


def gelu(a: Args) -> torch.Tensor:
    """Exact, tanh or sigmoid approximation by `mode`."""
    mode = a.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return a["x"] * torch.sigmoid(1.702 * a["x"])
    return F.gelu(a["x"], approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def thresholded_relu(a: Args) -> torch.Tensor:
    """x where x >= alpha, else 0."""
    return torch.where(a["x"] >= a.float("alpha"), a["x"], torch.zeros_like(a["x"]))


def prelu(a: Args) -> torch.Tensor:
    """Slope alpha [C] for negative values of channel axis 1."""
    alpha = a["alpha"].reshape([1, -1, *[1] * (a["x"].dim() - 2)])
    return torch.where(a["x"] >= 0, a["x"], a["x"] * alpha)


def select(a: Args) -> torch.Tensor:
    """a where cond, else b."""
    return torch.where(torch.as_tensor(a["cond"]).bool(), torch.as_tensor(a["a"]), torch.as_tensor(a["b"]))


def along(x: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """A per-channel vector (or a scalar) shaped so that it runs along `axis` of x."""
    if scale.dim() == 0 or scale.numel() == 1:
        return scale.reshape(())
    return scale.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def quantize(a: Args) -> torch.Tensor:
    """round(input / scale) + zero_point, saturated to the output type."""
    x, axis = a["input"], a.int("axis")
    bounds = torch.iinfo(TORCH_TYPES[a.output_types[0]])
    zero = torch.tensor(0.0) if a.get("zero_point") is None else along(x, a["zero_point"].float(), axis)
    return torch.clamp(torch.round(x / along(x, a["scale"], axis)) + zero, bounds.min, bounds.max)


def dequantize(a: Args) -> torch.Tensor:
    """(input - zero_point) * scale."""
    x, axis = a["input"].float(), a.int("axis")
    zero = torch.tensor(0.0) if a.get("zero_point") is None else along(x, a["zero_point"].float(), axis)
    return (x - zero) * along(x, a["scale"], axis)


OPERATIONS: dict[str, Operation] = {
    "identity": _unary(lambda x: x),
    "cast": _unary(lambda x: x),
    "abs": _unary(torch.abs),
    "ceil": _unary(torch.ceil),
    "cos": _unary(torch.cos),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "floor": _unary(torch.floor),
    "round": _unary(torch.round),
    "sign": _unary(torch.sign),
    "sin": _unary(torch.sin),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tanh": _unary(torch.tanh),
    "logical_not": _unary(torch.logical_not),
    "inverse": lambda a: 1 / (a["x"] + a.float("epsilon")),
    "log": lambda a: torch.log(a["x"] + a.float("epsilon")),
    "rsqrt": lambda a: torch.rsqrt(a["x"] + a.float("epsilon")),
    "threshold": lambda a: torch.clamp(a["x"], min=a.float("alpha")),
    "clip": clip,
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _binary(torch.div),
    "floor_div": _binary(torch.floor_divide),
    "mod": _binary(torch.remainder),
    "pow": _binary(torch.pow),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "equal": _binary(torch.eq),
    "not_equal": _binary(torch.ne),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor),
    "select": select,
    "relu": _unary(F.relu),
    "relu6": _unary(F.relu6),
    "silu": _unary(F.silu),
    "sigmoid": _unary(torch.sigmoid),
    "softplus": _unary(F.softplus),
    "softsign": _unary(F.softsign),
    "gelu": gelu,
    "elu": lambda a: F.elu(a["x"], a.float("alpha", 1.0)),
    "leaky_relu": lambda a: F.leaky_relu(a["x"], a.float("alpha", 0.01)),
    "prelu": prelu,
    "sigmoid_hard": lambda a: torch.clamp(a["x"] * a.float("alpha", 0.2) + a.float("beta", 0.5), 0, 1),
    "clamped_relu": lambda a: torch.clamp(F.leaky_relu(a["x"], a.float("alpha")), max=a.float("beta")),
    "linear_activation": lambda a: a["x"] * a.float("alpha", 1.0) + a.float("beta"),
    "thresholded_relu": thresholded_relu,
    "softmax": lambda a: torch.softmax(a["x"], a.int("axis", -1)),
    "reduce_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_mean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "reduce_max": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_min": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_prod": _reduce(_product),
    "reduce_l1_norm": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_sum_square": _reduce(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "reduce_log_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "reduce_log_sum_exp": _reduce(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "reduce_argmax": _arg_reduce(torch.argmax),
    "reduce_argmin": _arg_reduce(torch.argmin),
    "quantize": quantize,
    "dequantize": dequantize,
}

"""MIL operations with weights or windows: convolution, linear, matmul, attention, normalisation, pooling, upsampling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from edge_ibtm.targets.mil_args import Args, Operation


def _window_pad(a: Args, kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Padding [before, after] per spatial axis, flat, first axis first, from `pad_type` and `pad`."""
    kind = a.text("pad_type", "valid")
    if kind == "valid":
        return [0] * (2 * len(kernel))
    if kind == "custom":
        return a.ints("pad")
    pads: list[int] = []
    for size, k, stride, dilation in zip(a["x"].shape[2:], kernel, strides, dilations):
        total = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        pads += [large, small] if kind == "same_lower" else [small, large]
    return pads


def _padded(x: torch.Tensor, pads: list[int], value: float = 0.0) -> torch.Tensor:
    if not any(pads):
        return x
    pairs = [pads[i : i + 2] for i in range(0, len(pads), 2)]
    return F.pad(x, [p for pair in reversed(pairs) for p in pair], value=value)


def conv(a: Args) -> torch.Tensor:
    """x [B, Cin, *S], weight [Cout, Cin/groups, *K], 1 to 3 spatial axes."""
    x, weight = a["x"], a["weight"]
    axes = weight.dim() - 2
    strides = a.ints("strides") or [1] * axes
    dilations = a.ints("dilations") or [1] * axes
    pads = _window_pad(a, list(weight.shape[2:]), strides, dilations)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    return function(_padded(x, pads), weight, a.get("bias"), strides, 0, dilations, a.int("groups", 1))


def matmul(a: Args) -> torch.Tensor:
    """x @ y, either transposed in its last two axes first."""
    x, y = a["x"], a["y"]
    x = x.transpose(-1, -2) if a.flag("transpose_x") else x
    y = y.transpose(-1, -2) if a.flag("transpose_y") else y
    return torch.matmul(x, y)


def attention(a: Args) -> torch.Tensor:
    """softmax(q k^T / sqrt(E) + mask) v; a boolean mask keeps where true."""
    return F.scaled_dot_product_attention(a["query"], a["key"], a["value"], attn_mask=a.get("attn_mask"))


def batch_norm(a: Args) -> torch.Tensor:
    """Channel axis 1, with running statistics."""
    return F.batch_norm(
        a["x"], a["mean"], a["variance"], a.get("gamma"), a.get("beta"), False, 0.0, a.float("epsilon", 1e-5)
    )


def layer_norm(a: Args) -> torch.Tensor:
    """Normalised over `axes`, with gamma and beta shaped like them."""
    x = a["x"]
    axes = [axis % x.dim() for axis in a.ints("axes")] or list(range(x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + a.float("epsilon", 1e-5))
    shape = [x.shape[i] if i in axes else 1 for i in range(x.dim())]
    if a.get("gamma") is not None:
        y = y * a["gamma"].reshape(shape)
    return y if a.get("beta") is None else y + a["beta"].reshape(shape)


def instance_norm(a: Args) -> torch.Tensor:
    """Each channel of each image normalised on its own."""
    return F.instance_norm(a["x"], weight=a.get("gamma"), bias=a.get("beta"), eps=a.float("epsilon", 1e-5))


def l2_norm(a: Args) -> torch.Tensor:
    """x / sqrt(sum of squares over the last three axes + epsilon)."""
    axes = list(range(-min(3, a["x"].dim()), 0))
    return a["x"] * torch.rsqrt(a["x"].square().sum(axes, keepdim=True) + a.float("epsilon", 1e-6))


def _pool_windows(a: Args, fill: float) -> tuple[torch.Tensor, list[int], list[int]]:
    """x padded for its windows, kernel and strides; 1-D inputs get a leading spatial axis of one."""
    kernel = a.ints("kernel_sizes")
    strides = a.ints("strides") or [1] * len(kernel)
    pads = _window_pad(a, kernel, strides, [1] * len(kernel))
    if a.flag("ceil_mode"):
        for i, (size, k, s) in enumerate(zip(a["x"].shape[2:], kernel, strides)):
            length = size + pads[2 * i] + pads[2 * i + 1]
            outputs = math.ceil((length - k) / s) + 1
            if (outputs - 1) * s >= size + pads[2 * i]:
                outputs -= 1
            pads[2 * i + 1] += max((outputs - 1) * s + k - length, 0)
    return _padded(a["x"], pads, fill), kernel, strides


def max_pool(a: Args) -> torch.Tensor:
    """Largest of each window; padding never wins."""
    x, kernel, strides = _pool_windows(a, -math.inf)
    return {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)](x, kernel, strides)


def avg_pool(a: Args) -> torch.Tensor:
    """Mean of each window, with or without the padded zeros in the count."""
    x, kernel, strides = _pool_windows(a, 0.0)
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    mean = pool(x, kernel, strides)
    if not a.flag("exclude_padding_from_average"):
        return mean
    ones = Args(a.kind, {**a.values, "x": torch.ones_like(a["x"])}, a.output_types)
    return mean / pool(_pool_windows(ones, 0.0)[0], kernel, strides)


def upsample_bilinear(a: Args) -> torch.Tensor:
    """x [*, H, W] resized by linear interpolation along its last two axes."""
    height, width = a["x"].shape[-2:]
    return _interpolation(a, height, "scale_factor_height") @ a["x"] @ _interpolation(a, width, "scale_factor_width").T


def _interpolation(a: Args, size: int, scale: str) -> torch.Tensor:
    """Weights [out, size] along one axis; as in MIL, positions follow from the two sizes, not from the scale itself."""
    out = int((torch.tensor(a.float(scale, 1.0)) * size).floor())
    position = torch.arange(out, dtype=torch.float64)
    corners = a.flag("align_corners", True)
    centres = a.flag("half_pixel_centers", not corners)
    if corners and centres:
        raise ValueError("align_corners and half_pixel_centers are both true, which Core ML does not define")
    if corners:
        position = position * ((size - 1) / max(out - 1, 1))
    else:
        position = (position + 0.5) * (size / out) - 0.5 if centres else position * (size / out)
    distance = position.clamp(0, size - 1)[:, None] - torch.arange(size)
    return (1 - distance.abs()).clamp(min=0).float()


OPERATIONS: dict[str, Operation] = {
    "conv": conv,
    "linear": lambda a: F.linear(a["x"], a["weight"], a.get("bias")),
    "matmul": matmul,
    "scaled_dot_product_attention": attention,
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "upsample_bilinear": upsample_bilinear,
}

"""Operators that delegates leave out, said with operators that they take, while a model is captured.

A TorchFunctionMode sees every call that a model makes during torch.export, whoever wrote the module. Constants are made
from numpy arrays, so that export lifts them as constants instead of tracing how they are filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def filled_row(value: float, length: int, like: Tensor) -> Tensor:
    """A constant [1, length] of one value in the dtype of `like`."""
    return torch.from_numpy(np.full((1, length), value, np.float32)).to(like.dtype)


def roll(x: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    """torch.roll as slices and a concatenation for each axis (its own decomposition is an index look-up)."""
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else list(dims)
    for shift, dim in zip(shifts, dims):
        length = x.shape[dim]
        if cut := -shift % length:
            x = torch.cat([x.narrow(dim, cut, length - cut), x.narrow(dim, 0, cut)], dim)
    return x


def reduce_mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """torch.mean over any axes: the delegate's pooling over the last two of four, else a product with a row of 1/n."""
    dims = _axes(x, dim)
    if dims == [2, 3] and x.ndim == 4:
        pooled = torch.ops.aten.mean.dim(x, dims, True)
        return pooled if keepdim else pooled.reshape(x.shape[:2])
    return _product(x, dims, keepdim, 1.0 / math.prod(x.shape[d] for d in dims))


def average_pool(x: Tensor, output_size: Any) -> Tensor:
    """adaptive_avg_pool2d; to one place it is a mean, whatever order the map's axes have in memory."""
    if x.ndim == 4 and output_size in (1, (1, 1), [1, 1]):
        return reduce_mean(x, (2, 3), keepdim=True)
    return F.adaptive_avg_pool2d(x, output_size)


def reduce_sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """torch.sum over any axes as a product with a row of ones."""
    return _product(x, _axes(x, dim), keepdim, 1.0)


def _axes(x: Tensor, dim: Any) -> list[int]:
    if dim is None:
        return list(range(x.ndim))
    dims: Sequence[int] = [dim] if isinstance(dim, int) else dim
    return sorted(d % x.ndim for d in dims)


def _product(x: Tensor, dims: list[int], keepdim: bool, value: float) -> Tensor:
    kept = [d for d in range(x.ndim) if d not in dims]
    count = math.prod(x.shape[d] for d in dims)
    shape = [x.shape[d] for d in kept]
    if kept + dims != list(range(x.ndim)):
        x = x.permute(*kept, *dims)
    result = F.linear(x.reshape(*(shape or [1]), count), filled_row(value, count, x))
    final = [1 if d in dims else size for d, size in _sizes(kept, dims, shape)] if keepdim else shape
    return result.reshape(final)


def _sizes(kept: list[int], dims: list[int], shape: list[int]) -> list[tuple[int, int]]:
    sizes = dict(zip(kept, shape))
    return [(d, sizes.get(d, 1)) for d in range(len(kept) + len(dims))]


def get_item(x: Tensor, index: Any) -> Tensor:
    """x[index] with integers as slices of one followed by a reshape (a select is left out of the delegate)."""
    index = index if isinstance(index, tuple) else (index,)
    plain = all((isinstance(i, int | slice) and not isinstance(i, bool)) or i is Ellipsis for i in index)
    if not plain or not any(isinstance(i, int) for i in index):
        return torch.Tensor.__getitem__(x, index)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = index[:at] + (slice(None),) * (x.ndim - len(index) + 1) + index[at + 1 :]
    cut = [slice(i % x.shape[d], i % x.shape[d] + 1) if isinstance(i, int) else i for d, i in enumerate(index)]
    sliced = torch.Tensor.__getitem__(x, tuple(cut))
    gone = {d for d, i in enumerate(index) if isinstance(i, int)}
    return sliced.reshape([s for d, s in enumerate(sliced.shape) if d not in gone])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as one node: a batched product, or a linear layer of the constant b.

    torch.matmul decomposes into copies and three reshapes around the product; on operands that are no plain views it
    repeats a constant for every batch, outside the delegate.
    """
    if a.ndim == 3 and b.ndim == 3 and a.shape[0] == b.shape[0]:
        return torch.bmm(a, b)
    if a.ndim == 3 and b.ndim == 2:
        return F.linear(a, b.t())
    return torch.ops.aten.matmul.default(a, b)


REPLACED: dict[Any, Callable[..., Tensor]] = {
    torch.roll: roll,
    torch.mean: reduce_mean,
    torch.Tensor.mean: reduce_mean,
    F.adaptive_avg_pool2d: average_pool,
    torch.sum: reduce_sum,
    torch.Tensor.sum: reduce_sum,
    torch.Tensor.__getitem__: get_item,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
}


class DelegateOps(TorchFunctionMode):
    """While active, calls in REPLACED on floating-point tensors go to their replacements."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        new = REPLACED.get(func)
        if new is None or not _replaceable(args, kwargs):
            return func(*args, **kwargs)
        return new(*args, **kwargs)


def _replaceable(args: Any, kwargs: Any) -> bool:
    known = {"dim", "keepdim", "dtype", "shifts", "dims"}
    return (
        bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].ndim > 0
        and set(kwargs) <= known and kwargs.get("dtype") is None
    )  # fmt: skip

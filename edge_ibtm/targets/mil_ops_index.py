"""MIL operations that select by value or position: gather, scatter, top-k, sorting, cumulative sums, one-hot."""

from __future__ import annotations

import math

import torch

from edge_ibtm.targets.mil_args import Args, Operation


def _wrapped(indices: torch.Tensor, size: int) -> torch.Tensor:
    """Indices as int64, negative ones counted from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def gather(a: Args) -> torch.Tensor:
    """Slices of x along `axis`; the first `batch_dims` axes of x and indices go together."""
    x, indices, shared = a["x"], torch.as_tensor(a["indices"]), a.int("batch_dims")
    axis = a.int("axis") % x.dim()
    indices = _wrapped(indices, x.shape[axis])
    batch = math.prod(x.shape[:shared])
    rows = x.reshape(batch, *x.shape[shared:])
    picks = indices.reshape(batch, -1)
    parts = [row.index_select(axis - shared, pick) for row, pick in zip(rows, picks)]
    return torch.stack(parts).reshape(*x.shape[:axis], *indices.shape[shared:], *x.shape[axis + 1 :])


def gather_along_axis(a: Args) -> torch.Tensor:
    """x and indices of one shape but for `axis`: numpy's take_along_axis."""
    axis = a.int("axis")
    return torch.gather(a["x"], axis, _wrapped(a["indices"], a["x"].shape[axis]))


def _flat_positions(shape: torch.Size, indices: torch.Tensor) -> torch.Tensor:
    """Positions in the flattened leading axes that the last axis of `indices` addresses."""
    depth = indices.shape[-1]
    position = torch.zeros(indices.shape[:-1], dtype=torch.long)
    for axis in range(depth):
        position = position * shape[axis] + _wrapped(indices[..., axis], shape[axis])
    return position


def gather_nd(a: Args) -> torch.Tensor:
    """x[tuple of the last axis of indices], batch axes first."""
    x, indices, shared = a["x"], a["indices"], a.int("batch_dims")
    batch, depth = math.prod(x.shape[:shared]), indices.shape[-1]
    inner = x.shape[shared:]
    rows = x.reshape(batch, math.prod(inner[:depth]), *inner[depth:])
    positions = _flat_positions(inner, indices.reshape(batch, *indices.shape[shared:]))
    parts = [row[position] for row, position in zip(rows, positions)]
    return torch.stack(parts).reshape(*x.shape[:shared], *positions.shape[1:], *inner[depth:])


def _combine(data: torch.Tensor, axis: int, index: torch.Tensor, updates: torch.Tensor, mode: str) -> torch.Tensor:
    """torch's scatter along `axis` under MIL's modes: update, add, sub, mul, div, max, min."""
    if mode == "update":
        return data.scatter(axis, index, updates)
    if mode in ("add", "sub"):
        return data.scatter_add(axis, index, updates if mode == "add" else -updates)
    if mode in ("mul", "div"):
        return data.scatter_reduce(axis, index, updates if mode == "mul" else 1 / updates, "prod")
    return data.scatter_reduce(axis, index, updates, {"max": "amax", "min": "amin"}[mode])


def scatter_along_axis(a: Args) -> torch.Tensor:
    """data with `updates` put at `indices` along `axis`."""
    axis = a.int("axis")
    index = _wrapped(a["indices"], a["data"].shape[axis])
    return _combine(a["data"], axis, index, a["updates"].to(a["data"].dtype), a.text("mode", "add"))


def scatter(a: Args) -> torch.Tensor:
    """data with whole slices of `updates` put at `indices` of `axis`."""
    data, indices = a["data"], a["indices"]
    axis = a.int("axis") % data.dim()
    flat = _wrapped(indices, data.shape[axis]).reshape(-1)
    updates = a["updates"].reshape(*data.shape[:axis], flat.numel(), *data.shape[axis + 1 :]).to(data.dtype)
    index = flat.reshape([-1 if i == axis else 1 for i in range(data.dim())]).expand(updates.shape)
    return _combine(data, axis, index, updates, a.text("mode", "add"))


def scatter_nd(a: Args) -> torch.Tensor:
    """data with `updates` put where the last axis of `indices` points."""
    data, indices = a["data"], a["indices"]
    depth = indices.shape[-1]
    rows = data.reshape(math.prod(data.shape[:depth]), -1)
    positions = _flat_positions(data.shape, indices).reshape(-1, 1).expand(-1, rows.shape[1])
    updates = a["updates"].reshape(positions.shape[0], -1).to(data.dtype)
    return _combine(rows, 0, positions, updates, a.text("mode", "add")).reshape(data.shape)


def topk(a: Args) -> tuple[torch.Tensor, ...]:
    """The k largest (or smallest) along `axis`, best first; equal values in the order of their positions."""
    axis, k = a.int("axis", -1), a.int("k", 1)
    values, indices = torch.sort(a["x"], dim=axis, descending=not a.flag("ascending"), stable=True)
    if not a.flag("return_indices", True):
        return (values.narrow(axis, 0, k),)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


def argsort(a: Args) -> torch.Tensor:
    """Positions in sorted order, largest first unless `ascending`."""
    return torch.sort(a["x"], dim=a.int("axis", -1), descending=not a.flag("ascending"), stable=True)[1]


def cumsum(a: Args) -> torch.Tensor:
    """Running sum along `axis`; `exclusive` leaves out the value itself, `reverse` starts at the end."""
    x, axis = a["x"], a.int("axis")
    x = x.flip(axis) if a.flag("reverse") else x
    total = x.cumsum(axis)
    total = total - x if a.flag("exclusive") else total
    return total.flip(axis) if a.flag("reverse") else total


def one_hot(a: Args) -> torch.Tensor:
    """A new axis of `one_hot_vector_size`: on_value at the index, off_value elsewhere."""
    indices, size = a["indices"], a.int("one_hot_vector_size")
    axis = a.int("axis", -1) % (indices.dim() + 1)
    hit = indices.unsqueeze(axis) == torch.arange(size).reshape(
        [-1 if i == axis else 1 for i in range(indices.dim() + 1)]
    )
    on = torch.as_tensor(1 if a.get("on_value") is None else a["on_value"])
    off = torch.as_tensor(0 if a.get("off_value") is None else a["off_value"])
    return torch.where(hit, on, off)


OPERATIONS: dict[str, Operation] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "topk": topk,
    "argsort": argsort,
    "cumsum": cumsum,
    "one_hot": one_hot,
}

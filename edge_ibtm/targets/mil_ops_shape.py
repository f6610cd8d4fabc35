"""MIL operations that move values without computing: reshape, slice, pad, join, split, fill."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edge_ibtm.targets.mil_args import Args, Operation


def reshape(a: Args) -> torch.Tensor:
    """New shape; -1 is inferred and 0 copies the input's size."""
    x = a["x"]
    return x.reshape([x.shape[i] if s == 0 else s for i, s in enumerate(a.ints("shape"))])


def squeeze(a: Args) -> torch.Tensor:
    """Without the given axes of size one, or without all of them."""
    x = a["x"]
    axes = a.ints("axes") or [i for i, s in enumerate(x.shape) if s == 1]
    for axis in sorted((ax % x.dim() for ax in axes), reverse=True):
        x = x.squeeze(axis)
    return x


def expand_dims(a: Args) -> torch.Tensor:
    """New axes of size one at positions counted in the result."""
    x, axes = torch.as_tensor(a["x"]), a.ints("axes")
    rank = x.dim() + len(axes)
    for axis in sorted(ax % rank for ax in axes):
        x = x.unsqueeze(axis)
    return x


def slice_by_index(a: Args) -> torch.Tensor:
    """x[begin:end:stride] per axis, masks for open ends, squeeze_mask for axes that vanish."""
    x, begin, end = a["x"], a.ints("begin"), a.ints("end")
    stride = a.ints("stride") or [1] * x.dim()
    open_begin, open_end, squeezed = (
        [bool(v) for v in a.ints(name)] or [False] * x.dim() for name in ("begin_mask", "end_mask", "squeeze_mask")
    )
    for axis in range(x.dim()):
        if squeezed[axis]:
            x = x.narrow(axis, begin[axis] % x.shape[axis], 1)
            continue
        first = None if open_begin[axis] else begin[axis]
        last = None if open_end[axis] else end[axis]
        picked = range(*slice(first, last, stride[axis]).indices(x.shape[axis]))
        x = x.index_select(axis, torch.tensor(picked, dtype=torch.long))
    for axis in reversed(range(len(squeezed))):
        x = x.squeeze(axis) if squeezed[axis] else x
    return x


def slice_by_size(a: Args) -> torch.Tensor:
    """`size` values from `begin` per axis; -1 takes the rest."""
    x = a["x"]
    for axis, (begin, size) in enumerate(zip(a.ints("begin"), a.ints("size"))):
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def slice_update(a: Args) -> torch.Tensor:
    """A copy of x with the part that slice_by_index would take replaced by `update`."""
    x = a["x"].clone()
    places = torch.arange(x.numel()).reshape(x.shape)
    taken = slice_by_index(Args(a.kind, {**a.values, "x": places}, a.output_types))
    x.view(-1)[taken.reshape(-1)] = a["update"].expand(taken.shape).reshape(-1)
    return x


def pad(a: Args) -> torch.Tensor:
    """[before, after] for each of the last len(pad) / 2 axes."""
    flat, mode = a.ints("pad"), a.text("mode", "constant")
    pairs = [flat[i : i + 2] for i in range(0, len(flat), 2)]
    amounts = [p for pair in reversed(pairs) for p in pair]
    if mode == "constant":
        return F.pad(a["x"], amounts, value=a.float("constant_val"))
    while len(amounts) > 2 and amounts[-2:] == [0, 0]:  # torch pads fewer axes in the other modes
        amounts = amounts[:-2]
    return F.pad(a["x"], amounts, mode=mode)


def split(a: Args) -> tuple[torch.Tensor, ...]:
    """Parts along `axis` by their sizes or their number."""
    x, axis = a["x"], a.int("axis")
    sizes = a.ints("split_sizes")
    return torch.split(x, sizes or x.shape[axis] // a.int("num_splits"), dim=axis)


def concat(a: Args) -> torch.Tensor:
    """Joined along `axis`; `interleave` takes one channel of each in turn."""
    values, axis = a["values"], a.int("axis")
    if not a.flag("interleave"):
        return torch.cat([torch.as_tensor(v) for v in values], axis)
    stacked = torch.stack(values, axis % values[0].dim() + 1)
    shape = list(values[0].shape)
    shape[axis] *= len(values)
    return stacked.reshape(shape)


def depth_to_space(a: Args) -> torch.Tensor:
    """[B, b*b*C, H, W] -> [B, C, H*b, W*b], block index before channel."""
    x, b = a["x"], a.int("block_size")
    n, c, h, w = x.shape
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(a: Args) -> torch.Tensor:
    """[B, C, H, W] -> [B, b*b*C, H/b, W/b], block index before channel."""
    x, b = a["x"], a.int("block_size")
    n, c, h, w = x.shape
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


def flatten2d(a: Args) -> torch.Tensor:
    """[prod of axes before `axis`, prod of the others]."""
    x, axis = a["x"], a.int("axis", 1)
    rows = 1
    for size in x.shape[: axis if axis >= 0 else x.dim() + axis]:
        rows *= size
    return x.reshape(rows, -1)


def band_part(a: Args) -> torch.Tensor:
    """Zero outside `lower` sub-diagonals and `upper` super-diagonals; -1 keeps them all."""
    x, lower, upper = a["x"], a.int("lower", -1), a.int("upper", -1)
    x = x if lower < 0 else torch.triu(x, -lower)
    return x if upper < 0 else torch.tril(x, upper)


OPERATIONS: dict[str, Operation] = {
    "reshape": reshape,
    "reshape_like": lambda a: a["x"].reshape(a["ref_tensors"][0].shape),
    "transpose": lambda a: a["x"].permute(a.ints("perm")),
    "squeeze": squeeze,
    "expand_dims": expand_dims,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "pad": pad,
    "split": split,
    "concat": concat,
    "stack": lambda a: torch.stack([torch.as_tensor(v) for v in a["values"]], a.int("axis")),
    "tile": lambda a: a["x"].repeat(a.ints("reps")),
    "reverse": lambda a: a["x"].flip(a.ints("axes") or list(range(a["x"].dim()))),
    "fill": lambda a: torch.full(a.ints("shape"), torch.as_tensor(a["value"]).item()),
    "fill_like": lambda a: torch.full(a["ref_tensor"].shape, torch.as_tensor(a["value"]).item()),
    "shape": lambda a: torch.tensor(a["x"].shape),
    "range_1d": lambda a: torch.arange(
        *(torch.as_tensor(a[k]).item() for k in ("start", "end", "step")),
    ),
    "depth_to_space": depth_to_space,
    "space_to_depth": space_to_depth,
    "pixel_shuffle": lambda a: F.pixel_shuffle(a["x"], a.int("upscale_factor")),
    "pixel_unshuffle": lambda a: F.pixel_unshuffle(a["x"], a.int("downscale_factor")),
    "flatten2d": flatten2d,
    "band_part": band_part,
}

"""Tensors as raw files, the way the runner reads and writes them, and how near two sets of outputs are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_ibtm.errors import DeviceError, UsageError
from edge_ibtm.probe.schema import Parity

_DTYPES = {
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Half": "float16",
    "Float": "float32",
    "Double": "float64",
    "Bool": "bool",
    "BFloat16": "bfloat16",
}


def write_inputs(inputs: Sequence[Any], folder: Path, prefix: str = "input") -> list[Path]:
    """Write each tensor as raw little-endian values; the files in order."""
    import torch

    files = []
    for index, tensor in enumerate(inputs):
        file = folder / f"{prefix}{index}.bin"
        file.write_bytes(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        files.append(file)
    return files


def read_outputs(path: Path, described: Sequence[dict[str, Any]]) -> list[Any]:
    """Tensors from the runner's output file, cut by its report ([{dtype, shape, nbytes}]). DeviceError if it
    is short.
    """
    import torch

    data = bytearray(path.read_bytes())
    if len(data) != sum(one["nbytes"] for one in described):
        raise DeviceError(f"{path.name} holds {len(data)} bytes, the runner announced {described}; run it again")
    tensors, start = [], 0
    for one in described:
        dtype = getattr(torch, _DTYPES[one["dtype"]])
        piece = data[start : start + one["nbytes"]]
        flat = torch.frombuffer(piece, dtype=dtype) if piece else torch.empty(0, dtype=dtype)
        tensors.append(flat.reshape([int(size) for size in one["shape"]]))
        start += one["nbytes"]
    return tensors


def parity_of(outputs: Sequence[Any], reference: Sequence[Any], name: str, limit: float) -> Parity:
    """Outputs against a reference, all tensors together; ok when no value differs by more than `limit`."""
    if [tuple(o.shape) for o in outputs] != [tuple(r.shape) for r in reference]:
        shapes = [[tuple(t.shape) for t in side] for side in (outputs, reference)]
        raise UsageError(f"outputs have shapes {shapes[0]}, {name} {shapes[1]}; is it the same model and batch?")
    signal = noise = max_abs = 0.0
    identical = True
    for mine, theirs in zip(outputs, reference, strict=True):
        a, b = mine.detach().double(), theirs.detach().double()
        signal += float(b.square().sum())
        noise += float((a - b).square().sum())
        max_abs = max(max_abs, float((a - b).abs().max())) if a.numel() else max_abs
        identical = identical and bool((a == b).all())
    if not math.isfinite(noise):
        raise DeviceError(f"outputs hold NaN or infinity where {name} does not; the kernels on this device are wrong")
    sqnr = None if noise == 0 else 10 * math.log10(signal / noise) if signal else 0.0
    return Parity(
        reference=name,
        max_abs=max_abs,
        sqnr_db=sqnr,
        identical=identical,
        ok=max_abs <= limit,
        limit=f"max abs difference <= {limit:.3g}",
    )

"""Tensors as raw files, the way the runner reads and writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_ibtm.errors import DeviceError

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

"""The arguments of one MIL operation, as torch tensors and Python values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Result = torch.Tensor | tuple[torch.Tensor, ...] | Any
TORCH_TYPES = {
    "fp16": torch.float32,  # rounded to half, kept in single: see `stored`
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bool": torch.bool,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int32,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
}


def stored(value: Any, dtype: str) -> Any:
    """`value` as a variable of MIL type `dtype` holds it: fp16 rounds to half (and overflows to inf as half does)."""
    if dtype not in TORCH_TYPES:
        return value
    tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    return tensor.half().float() if dtype == "fp16" else tensor.to(TORCH_TYPES[dtype])


@dataclass(frozen=True)
class Args:
    """Inputs of an operation by their MIL names; fp16 inputs arrive as fp32 tensors that hold half values."""

    kind: str
    values: Mapping[str, Any]
    output_types: tuple[str, ...]

    def __getitem__(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise KeyError(f"operation {self.kind!r} has no input {name!r}")
        return self.values[name]

    def get(self, name: str) -> Any:
        """The input, or None when it was left out."""
        return self.values.get(name)

    def ints(self, name: str) -> list[int]:
        """A list of integers such as axes or strides; empty when left out."""
        value = self.values.get(name)
        return [] if value is None else [int(v) for v in torch.as_tensor(value).reshape(-1)]

    def int(self, name: str, default: int = 0) -> int:
        """One integer."""
        value = self.values.get(name)
        return default if value is None else int(value)

    def float(self, name: str, default: float = 0.0) -> float:
        """One number."""
        value = self.values.get(name)
        return default if value is None else float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """One truth value."""
        value = self.values.get(name)
        return default if value is None else bool(value)

    def text(self, name: str, default: str = "") -> str:
        """One string such as a padding mode."""
        value = self.values.get(name)
        return default if value is None else str(value)


Operation = Callable[[Args], Result]

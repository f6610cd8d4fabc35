"""The values of XNNPACK's graph as ExecuTorch writes it: their tensors, who makes them, who reads them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_INVALID_VALUE_ID as NOTHING


def tensor_of(value: schema.XValue) -> Any:
    """The tensor of a value, rounded or not."""
    return getattr(value.xvalue_union, "tensor_value", value.xvalue_union)


def output_of(operator: Any) -> int:
    """The value an operator makes; its first, of an operator that makes two."""
    return getattr(operator, "output_id", getattr(operator, "output_value_id", NOTHING))


def inputs_of(operator: Any) -> list[str]:
    """The fields of an operator that name values it reads."""
    names = [f.name for f in fields(operator) if f.name.endswith("_id") and not f.name.startswith("output")]
    return [name for name in names if getattr(operator, name) != NOTHING]

"""The values of XNNPACK's graph as ExecuTorch writes it: their tensors, who makes them, who reads them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace
from typing import Any, TypeVar

from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_INVALID_VALUE_ID as NOTHING

Operator = TypeVar("Operator")


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


def new_value(values: dict[int, schema.XValue], like: int, dims: list[int]) -> int:
    """Add a value between operators to `values`, by id: of these dims, else like another one; returns its id."""
    made, old = max(values) + 1, values[like].xvalue_union
    tensor = replace(tensor_of(values[like]), dims=dims, num_dims=len(dims), external_id=NOTHING, flags=0, id_out=made)
    values[made] = schema.XValue(replace(old, tensor_value=tensor) if hasattr(old, "tensor_value") else tensor)
    return made


class Index:
    """A graph, with the node that makes each value and the operators that read it, once for each time they do."""

    def __init__(self, graph: schema.XNNGraph) -> None:
        self.graph = graph
        self.values = {tensor_of(value).id_out: value for value in graph.xvalues}
        self.maker: dict[int, schema.XNode] = {}
        self.readers: dict[int, list[Any]] = defaultdict(list)
        for node in graph.xnodes:
            operator = node.xnode_union
            self.maker[output_of(operator)] = node
            for name in inputs_of(operator):
                self.readers[getattr(operator, name)].append(operator)

    def made(self, value: int, kind: type[Operator]) -> Operator | None:
        """The operator of `kind` that makes a value."""
        node = self.maker.get(value)
        return node.xnode_union if node is not None and isinstance(node.xnode_union, kind) else None

    def external(self, value: int) -> bool:
        return bool(tensor_of(self.values[value]).external_id != NOTHING)

    def dims(self, value: int) -> list[int]:
        return tensor_of(self.values[value]).dims  # type: ignore[no-any-return]

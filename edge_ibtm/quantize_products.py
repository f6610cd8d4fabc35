"""Batched products of 8-bit values that XNNPACK runs in float, not with the slower kernel for 8-bit weights.

Where the second operand's zero point is 0, XNNPACK 1.5.1 takes it for weights of a float product: 2.4 times the time of the
float kernel (measured on AVX2). A zero point of 1 moves the range by one of its 256 steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

_STAGES = {f"quantized_decomposed.{name}_per_tensor.default" for name in ("quantize", "dequantize")}
_VIEWS = {"reshape", "view", "permute", "transpose", "expand", "contiguous", "clone", "slice", "narrow"}


def move_zero_points(graph: GraphModule) -> int:
    """Give the second operands of batched products a zero point of 1 where it is 0, back to the layer that they come from;
    in place. Values that something else reads too are left. Returns how many products that changed."""
    moved = 0
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.bmm.default and (stages := _stages(node.args[1])):
            for stage in stages:
                stage.args = (*stage.args[:2], 1, *stage.args[3:])
            moved += 1
    graph.recompile()
    return moved


def _stages(value: Any) -> list[Node]:
    """The roundings, all of zero point 0, that a product's operand went through; none where others read it too."""
    stages: list[Node] = []
    while isinstance(value, Node) and ((rounds := str(value.target) in _STAGES) or _is_view(value)):
        if len(value.users) > 1 or (rounds and value.args[2] != 0):
            return []
        stages += [value] if rounds else []
        value = value.args[0]
    return stages


def _is_view(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == "aten" and node.target._schema.name.split("::")[1] in _VIEWS  # type: ignore[union-attr]

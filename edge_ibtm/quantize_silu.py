"""SiLU between 8-bit layers stays in 8 bits: x * sigmoid(x) as a look-up table and a product of int8 values.

Left in float, every SiLU of a CNN costs two conversions, a sigmoid and a product of 32-bit values. XNNPACK makes one table of
an 8-bit value's dequantization, sigmoid and quantization, and multiplies int8 with int8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import FixedQParamsQuantizationSpec, QuantizationAnnotation, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

aten = torch.ops.aten
_SILU = {aten.silu.default, aten.silu_.default}


def split_silu(module: GraphModule) -> None:
    """Write every SiLU as its sigmoid and a product; in place."""
    graph = module.graph
    for node in [n for n in graph.nodes if n.target in _SILU]:
        x = node.args[0]
        with graph.inserting_before(node):
            gate = graph.call_function(aten.sigmoid.default, (x,))
            product = graph.call_function(aten.mul.Tensor, (x, gate))
        gate.meta, product.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    module.recompile()


class SiluQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates x * sigmoid(x) where `keep` accepts x; `activation` is the spec of its input and output.

    The sigmoid has steps of 1/256 from 0 on, the finest that cover its range.
    """

    def __init__(self, activation: Any, keep: Callable[[Node], bool]) -> None:
        super().__init__()
        self.activation, self.keep = activation, keep

    def annotate(self, model: GraphModule) -> GraphModule:
        steps = FixedQParamsQuantizationSpec(
            dtype=torch.int8, scale=1 / 256, zero_point=-128, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine
        )
        act = self.activation
        for product in model.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            x, gate = product.args
            if not isinstance(x, Node) or not isinstance(gate, Node) or not self.keep(x):
                continue
            if gate.target is aten.sigmoid.default and gate.args[0] is x:
                gate.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation({x: act}, steps, _annotated=True)
                product.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation({x: act, gate: steps}, act, _annotated=True)
        return model

    def validate(self, model: GraphModule) -> None:
        """Every annotation above is one that XNNPACK takes."""

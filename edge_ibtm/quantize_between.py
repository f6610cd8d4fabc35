"""What lies between 8-bit layers and stays in 8 bits: SiLU, and concatenations of what such layers give.

Left in float, every SiLU of a CNN costs two conversions, a sigmoid and a product of 32-bit values. XNNPACK makes one table of
an 8-bit value's dequantization, sigmoid and quantization, and multiplies int8 with int8.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer_utils import propagate_annotation
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from edge_ibtm.quantize import module_types

aten = torch.ops.aten
_SIGMOID = FixedQParamsQuantizationSpec(  # steps of 1/256 from 0 on, the finest that cover its range
    dtype=torch.int8, scale=1 / 256, zero_point=-128, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine
)


class LayerQuantizer(XNNPACKQuantizer):  # type: ignore[misc]
    """XNNPACK's quantizer but for concatenations and the means of our own modules, whatever its filter says.

    Merge sites are full of concatenations, and a roll's pieces, rounded with other steps than the whole, are not delegated. A
    mean that decides what merges would be rounded to the steps of what it is taken of.
    """

    SUPPORTED_PATTERNS: ClassVar = [p for p in XNNPACKQuantizer.SUPPORTED_PATTERNS if p.name != "cat"]

    def annotate(self, model: GraphModule) -> GraphModule:
        for mean in model.graph.find_nodes(op="call_function", target=aten.mean.dim):
            if (module_types(mean) or [""])[-1].startswith("edge_ibtm."):
                mean.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)
        return super().annotate(model)  # type: ignore[no-any-return]


class BetweenQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates x * sigmoid(x), and concatenations, of values that are annotated; runs after LayerQuantizer.

    activation: the spec of inputs and outputs.
    """

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation

    def annotate(self, model: GraphModule) -> GraphModule:
        for product in model.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            self._silu(product)
        propagate_annotation(model)  # to permutations and reshapes, which a concatenation may read
        for cat in model.graph.find_nodes(op="call_function", target=aten.cat.default):
            if all(_quantized(n) for n in cat.args[0]):
                self._concatenation(cat)
        propagate_annotation(model)
        return model

    def validate(self, model: GraphModule) -> None:
        """Every annotation here is one that XNNPACK takes."""

    def _silu(self, product: Node) -> None:
        x, gate = product.args
        if not isinstance(x, Node) or not isinstance(gate, Node) or not _quantized(x):
            return
        if gate.target is aten.sigmoid.default and gate.args[0] is x:
            gate.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation({x: self.activation}, _SIGMOID, _annotated=True)
            both = {x: self.activation, gate: _SIGMOID}
            product.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(both, self.activation, _annotated=True)

    def _concatenation(self, cat: Node) -> None:
        first, *others = cat.all_input_nodes
        shared = SharedQuantizationSpec((first, cat))
        inputs = {first: self.activation, **dict.fromkeys(others, shared)}
        cat.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(inputs, shared, _annotated=True)


def _quantized(node: Node) -> bool:
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation.output_qspec is not None

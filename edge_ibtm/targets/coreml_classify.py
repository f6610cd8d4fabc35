"""Class labels in an ML Program: Vision's `classLabel` and `classLabel_probs` beside the logits."""

from __future__ import annotations

from typing import Any

from edge_ibtm.errors import UsageError

LOGITS, LABEL, PROBABILITIES = "logits", "classLabel", "classLabel_probs"


def add_classifier(spec: Any, names: list[str]) -> None:
    """Append softmax and Core ML's `classify` to the program: outputs classLabel and classLabel_probs beside logits.

    coremltools' own classifier_config cannot keep the logits as an output (it fails when the outputs are declared).
    """
    from coremltools import proto

    program = spec.mlProgram.functions["main"]
    block = program.block_specializations[program.opset]
    logits = next((o for op in block.operations for o in op.outputs if o.name == LOGITS), None)
    if logits is None:
        raise UsageError(f"the program has no output named {LOGITS!r} to classify")
    axis = _constant(proto, "classify_axis", -1)
    softmax = proto.MIL_pb2.Operation(type="softmax")
    softmax.inputs["x"].arguments.add(name=LOGITS)
    softmax.inputs["axis"].arguments.add(name="classify_axis")
    softmax.outputs.add(name="probabilities", type=logits.type)
    _name(softmax, "probabilities")
    classify = proto.MIL_pb2.Operation(type="classify")
    classify.inputs["probabilities"].arguments.add(name="probabilities")
    labels = classify.inputs["classes"].arguments.add().value
    string = proto.MIL_pb2.STRING
    labels.type.listType.type.tensorType.dataType = string
    labels.type.listType.length.constant.size = len(names)
    for name in names:
        item = labels.immediateValue.list.values.add()
        item.type.tensorType.dataType = string
        item.immediateValue.tensor.strings.values.append(name)
    chosen = classify.outputs.add(name=LABEL)
    chosen.type.tensorType.dataType = string
    table = classify.outputs.add(name=PROBABILITIES)
    table.type.dictionaryType.keyType.tensorType.dataType = string
    table.type.dictionaryType.valueType.tensorType.dataType = proto.MIL_pb2.FLOAT64
    _name(classify, "classify")
    block.operations.extend([axis, softmax, classify])
    block.outputs.extend([LABEL, PROBABILITIES])
    description = spec.description
    description.output.add(name=LABEL).type.stringType.SetInParent()
    description.output.add(name=PROBABILITIES).type.dictionaryType.stringKeyType.SetInParent()
    description.predictedFeatureName, description.predictedProbabilitiesName = LABEL, PROBABILITIES


def _constant(proto: Any, name: str, value: int) -> Any:
    op = proto.MIL_pb2.Operation(type="const")
    op.outputs.add(name=name).type.tensorType.dataType = proto.MIL_pb2.INT32
    _name(op, name)
    held = op.attributes["val"]
    held.type.tensorType.dataType = proto.MIL_pb2.INT32
    held.immediateValue.tensor.ints.values.append(value)
    return op


def _name(op: Any, name: str) -> None:
    from coremltools import proto

    op.attributes["name"].type.tensorType.dataType = proto.MIL_pb2.STRING
    op.attributes["name"].immediateValue.tensor.strings.values.append(name)

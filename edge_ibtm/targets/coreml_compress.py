"""Smaller numbers for a converted Core ML program: int8 weights, palettes, calibrated int8 activations.

coremltools compresses the weights. Its own calibration of activations needs Core ML (and keeps the range of the last
sample only), so the ranges come from edge_ibtm.targets.mil_eval here; coremltools' passes then insert the quantize and
dequantize operations. Constants of merge sites, and what runs in single precision to decide a merge, stay as they are.
Residual additions stay in float: quantizing them costs a vision transformer most of its accuracy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.errors import UsageError
from edge_ibtm.targets.coreml_package import operations
from edge_ibtm.targets.coreml_tools import quiet_coremltools

if TYPE_CHECKING:
    import torch

QUANTIZED_INPUTS = ("conv", "linear")  # operations whose input activation becomes int8
LEAST_RANGE = 0.01  # 127 steps of the smallest normal half-precision number are 0.0078


def compress(mlmodel: Any, precision: str, calibration: torch.Tensor | None) -> Any:
    """The MLModel with weights and activations as `precision` says; fp16 and fp32 pass through.

    calibration: what the program's input receives, float [n, C, H, W]; w8a8 needs it. Raises UsageError without.
    """
    if precision == "w8a8":
        if calibration is None or len(calibration) == 0:
            raise UsageError("precision 'w8a8' needs calibration images: CoreMLOptions(calibration=[n, 3, H, W])")
        mlmodel = quantize_activations(mlmodel, calibration)
    with quiet_coremltools() as ct:
        cto = ct.optimize.coreml
        if precision in ("int8w", "w8a8"):
            config = cto.OpLinearQuantizerConfig(mode="linear_symmetric")
            return cto.linear_quantize_weights(mlmodel, _config(cto, config, mlmodel))
        if precision in ("pal4", "pal6"):
            config = cto.OpPalettizerConfig(mode="kmeans", nbits=int(precision[-1]))
            return cto.palettize_weights(mlmodel, _config(cto, config, mlmodel))
    return mlmodel


def _config(cto: Any, config: Any, mlmodel: Any) -> Any:
    """One configuration for all weights but those of merge sites."""
    spared = dict.fromkeys(_spared_constants(mlmodel.get_spec()))
    return cto.OptimizationConfig(global_config=config, op_name_configs=spared)


def _spared_constants(spec: Any) -> set[str]:
    """Constants written in code (triangles, ones, positions), and those in single precision of a half program."""
    from coremltools import proto

    floats = [proto.MIL_pb2.FLOAT16, proto.MIL_pb2.FLOAT32]
    constants = {
        op.outputs[0].name: op.outputs[0].type.tensorType
        for op in operations(spec)
        if op.type == "const" and op.outputs[0].type.tensorType.dataType in floats
    }
    half = any(kind.dataType == proto.MIL_pb2.FLOAT16 and kind.rank > 1 for kind in constants.values())
    return {
        name
        for name, kind in constants.items()
        if "lifted_tensor" in name or (half and kind.dataType == proto.MIL_pb2.FLOAT32)
    }


def quantize_activations(mlmodel: Any, calibration: torch.Tensor) -> Any:
    """The MLModel with int8 inputs to every convolution and linear layer, symmetric, per tensor."""
    ranges = activation_ranges(mlmodel, calibration)
    with quiet_coremltools() as ct:
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.converters.mil.mil.passes.graph_pass import PassOption
        from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
        from coremltools.models.utils import _apply_graph_pass

        cto = ct.optimize.coreml
        symmetric = cto.OpLinearQuantizerConfig(mode="linear_symmetric")
        config = cto.OptimizationConfig(
            op_type_configs=dict.fromkeys(QUANTIZED_INPUTS, symmetric),
            op_name_configs=dict.fromkeys(_spared_operations(mlmodel.get_spec(), ranges)),
        )
        passes = []
        for place in ("prefix", "suffix"):
            step = PASS_REGISTRY[f"compression::insert_{place}_quantize_dequantize_pair"]
            step.set_options([PassOption("config", config), PassOption("activation_stats", ranges)])
            passes.append(step)
        passes.append(PASS_REGISTRY["common::dequantize_quantize_pair_elimination"])
        version = max(mlmodel.get_spec().specificationVersion, ct.target.iOS17.value)
        return _apply_graph_pass(mlmodel, passes, spec_version=version, pymil_load_func=load, skip_model_load=True)


def _spared_operations(spec: Any, ranges: dict[str, dict[str, float]]) -> set[str]:
    """Layers with spared weights, and those whose inputs are so near zero that a half-precision scale cannot hold them."""
    weights = _spared_constants(spec)

    def tiny(name: str) -> bool:
        seen = ranges.get(name, {"rmin": 0.0, "rmax": 0.0})
        return max(-seen["rmin"], seen["rmax"]) < LEAST_RANGE

    return {
        op.attributes["name"].immediateValue.tensor.strings.values[0]
        for op in operations(spec)
        if op.type in QUANTIZED_INPUTS
        and (op.inputs["weight"].arguments[0].name in weights or tiny(op.inputs["x"].arguments[0].name))
    }


def activation_ranges(mlmodel: Any, calibration: torch.Tensor) -> dict[str, dict[str, float]]:
    """Smallest and largest value of every float variable over the images: name -> {rmin, rmax}."""
    import torch

    from edge_ibtm.targets.mil_eval import load_program

    with tempfile.TemporaryDirectory() as folder, quiet_coremltools():
        path = Path(folder) / "float.mlpackage"
        mlmodel.save(str(path))
        program = load_program(path)
    ranges: dict[str, dict[str, float]] = {}

    def watch(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            low, high = float(value.min()), float(value.max())
            seen = ranges.setdefault(name, {"rmin": low, "rmax": high})
            seen["rmin"], seen["rmax"] = min(seen["rmin"], low), max(seen["rmax"], high)

    for image in calibration:
        program.run({next(iter(program.inputs)): image[None]}, watch)
    return ranges

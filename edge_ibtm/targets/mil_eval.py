"""A Core ML package run without Core ML: its ML Program, operation by operation, with torch.

coremltools' milproto loader reads the program; each operation is one small function in the mil_ops_* tables. Every
result is stored in the type the program declares, so an fp16 program is rounded to half after every operation; inside
an operation (the sum of a matmul, the exponentials of a softmax) arithmetic is fp32. Apple's compute units may also
accumulate in half and fuse operations, so this proves the conversion and its number formats, not one device's last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from edge_ibtm.errors import CannotRunHere, EdgeIBTMError, UsageError
from edge_ibtm.targets import mil_ops_index, mil_ops_math, mil_ops_nn, mil_ops_shape
from edge_ibtm.targets.coreml_package import class_labels, image_tensor, open_package, operations
from edge_ibtm.targets.coreml_tools import quiet_coremltools
from edge_ibtm.targets.mil_args import Args, Operation, stored

COMPRESSED = frozenset(
    {
        "constexpr_affine_dequantize",
        "constexpr_blockwise_shift_scale",
        "constexpr_cast",
        "constexpr_lut_to_dense",
        "constexpr_lut_to_sparse",
        "constexpr_sparse_blockwise_shift_scale",
        "constexpr_sparse_to_dense",
    }
)
OPERATIONS: dict[str, Operation] = {
    **mil_ops_math.OPERATIONS,
    **mil_ops_nn.OPERATIONS,
    **mil_ops_shape.OPERATIONS,
    **mil_ops_index.OPERATIONS,
}
Watch = Callable[[str, Any], None]
KNOWN = COMPRESSED | set(OPERATIONS) | {"const", "classify"}


@dataclass(frozen=True)
class Step:
    """One operation made ready: inputs are variable names where they vary and tensors where they are constant."""

    kind: str
    name: str
    constants: dict[str, Any]
    variables: dict[str, Any]
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MILProgram:
    """The main function of an ML Program, ready to run any number of times."""

    inputs: dict[str, tuple[int, ...]]
    outputs: list[str]
    steps: list[Step]
    labels: list[str]

    def run(self, feeds: dict[str, torch.Tensor], watch: Watch | None = None) -> dict[str, Any]:
        """Outputs by name: tensors; with labels also the winning label and the table label -> probability.

        watch: called with the name and value of every variable.
        """
        env: dict[str, Any] = dict(feeds)
        watch = watch or (lambda _name, _value: None)
        for name, value in feeds.items():
            watch(name, value)
        with torch.no_grad():
            for step in self.steps:
                for (name, dtype), value in zip(step.outputs, self._results(step, env)):
                    env[name] = stored(value, dtype)
                    watch(name, env[name])
        return {name: env[name] for name in self.outputs}

    def _results(self, step: Step, env: dict[str, Any]) -> tuple[Any, ...]:
        if step.kind == "classify":
            return self._classified(env[str(step.variables["probabilities"])])
        varying = {k: _resolved(v, env) for k, v in step.variables.items()}
        args = Args(step.kind, {**step.constants, **varying}, tuple(t for _, t in step.outputs))
        try:
            result = OPERATIONS[step.kind](args)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise EdgeIBTMError(f"ML Program operation {step.kind} {step.name!r} could not be run: {error}") from error
        return result if isinstance(result, tuple) else (result,)

    def _classified(self, probabilities: torch.Tensor) -> tuple[str, dict[str, float]]:
        values = probabilities.reshape(-1)
        return self.labels[int(values.argmax())], dict(zip(self.labels, values.tolist()))


def _resolved(reference: Any, env: dict[str, Any]) -> Any:
    if isinstance(reference, list):
        return [_resolved(r, env) for r in reference]
    return env[reference] if isinstance(reference, _Name) else reference


def load_program(path: str | Path) -> MILProgram:
    """Read a package. All operations without an evaluator are named in one CannotRunHere before anything runs."""
    mlmodel = open_package(path)
    spec = mlmodel.get_spec()
    counted = Counter(op.type for op in operations(spec))
    unknown = {kind: count for kind, count in counted.items() if kind not in KNOWN}
    if unknown:
        named = ", ".join(f"{kind} ({count})" for kind, count in sorted(unknown.items()))
        raise CannotRunHere(
            f"{path} uses ML Program operations that cannot be evaluated here: {named}; run it with Core ML, on a Mac"
        )
    with quiet_coremltools():
        from coremltools.converters.mil.frontend.milproto.load import load

        program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=mlmodel.weights_dir)
        main = program.functions["main"]
        steps = [_step(op) for op in main.operations if op.op_type != "const" and op.op_type not in COMPRESSED]
    return MILProgram(
        inputs={name: tuple(int(s) for s in var.shape) for name, var in main.inputs.items()},
        outputs=[var.name for var in main.outputs],
        steps=steps,
        labels=class_labels(spec),
    )


def _step(op: Any) -> Step:
    constants: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    for name, value in op.inputs.items():
        if value is None or (op.op_type == "classify" and name == "classes"):
            continue
        held = [_held(v) for v in value] if isinstance(value, (list, tuple)) else _held(value)
        varies = isinstance(held, _Name) or (isinstance(held, list) and any(isinstance(h, _Name) for h in held))
        (variables if varies else constants)[name] = held
    outputs = tuple((var.name, _dtype(var)) for var in op.outputs)
    return Step(op.op_type, op.name, constants, variables, outputs)


class _Name(str):
    """A variable's name, told apart from a string constant such as a padding mode."""


def _held(var: Any) -> Any:
    """The constant value of a variable, or its name when it is computed."""
    producer = var.op
    if producer is not None and producer.op_type in COMPRESSED:
        return stored(torch.from_numpy(producer.materialized_val_inference()), _dtype(var))
    if var.val is None:
        return _Name(var.name)
    return var.val if isinstance(var.val, str) else stored(_as_tensor(var.val), _dtype(var))


def _as_tensor(value: Any) -> torch.Tensor:
    import numpy as np

    array = np.array(value)
    return torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array)


def _dtype(var: Any) -> str:
    from coremltools.converters.mil.mil import types

    dtype = var.dtype if not types.is_dict(var.sym_type) and not types.is_list(var.sym_type) else None
    return types.builtin_to_string(dtype) if dtype is not None else "dict"


@lru_cache(maxsize=2)
def _loaded(path: str, _state: tuple[tuple[str, int, int], ...]) -> tuple[MILProgram, Any]:
    """The program of a package and its specification."""
    return load_program(path), open_package(path).get_spec()


def predict(path: str | Path, images: torch.Tensor) -> torch.Tensor:
    """See `coreml_package.run_mlpackage`. The two packages used last stay loaded, until their files change."""
    files = sorted(f for f in Path(path).rglob("*") if f.is_file() and f.name != "Manifest.json")  # opening rewrites it
    state = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    program, spec = _loaded(str(path), state)
    if len(spec.description.input) != 1:
        names = ", ".join(f.name for f in spec.description.input)
        raise UsageError(f"{path} takes {len(spec.description.input)} inputs ({names}); one image input is expected")
    feature = spec.description.input[0]
    given = image_tensor(spec, images)
    wanted = program.inputs[feature.name]
    if given.shape[1:] != torch.Size(wanted[1:]):
        raise UsageError(f"{path} takes images {list(wanted)}, got {list(images.shape)}: resize them")
    return torch.cat([_logits(program.run({feature.name: image[None]})) for image in given])


def _logits(outputs: dict[str, Any]) -> torch.Tensor:
    """The `logits` output, else the first tensor, else the probabilities of a foreign classifier."""
    tensors = {k: v for k, v in outputs.items() if isinstance(v, torch.Tensor)}
    if tensors:
        return tensors.get("logits", next(iter(tensors.values())))
    table = next(v for v in outputs.values() if isinstance(v, dict))
    return torch.tensor([list(table.values())])

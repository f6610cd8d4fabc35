"""ExecuTorch's Core ML `.pte`: an app on iOS that already runs ExecuTorch loads it; Linux can lower it but not load it.

The `.pte` carries a whole `.mlpackage` as the delegate's payload. `extract_mlpackage` takes it out again, so that the
evaluator can run here what Core ML would run there. Inputs are normalised float tensors, as for every `.pte`.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_ibtm.errors import CannotRunHere, EdgeIBTMError, UsageError
from edge_ibtm.files import check_pte
from edge_ibtm.targets.common import Artifact, Backend, check_example, exporting, first_line, lower_exported
from edge_ibtm.targets.coreml import DEPLOYMENT_TARGETS, inference_copy
from edge_ibtm.targets.coreml_package import replacing, run_mlpackage
from edge_ibtm.targets.coreml_tools import quiet_coremltools
from edge_ibtm.targets.runtime import COREML

PRECISIONS = {"fp16": "FLOAT16", "fp32": "FLOAT32"}


def lower_coreml_pte(
    model: nn.Module, example: Any, path: str | Path, precision: str = "fp16", deployment: str = "iOS17"
) -> Artifact:
    """Lower `model` to a `.pte` whose delegate is Core ML. Raises UsageError for bad options, EdgeIBTMError otherwise."""
    if precision not in PRECISIONS or deployment not in DEPLOYMENT_TARGETS:
        raise UsageError(
            f"a Core ML .pte takes precision {' or '.join(PRECISIONS)} and deployment "
            f"{', '.join(DEPLOYMENT_TARGETS)}; got {precision!r} and {deployment!r}"
        )
    inputs = check_example(example)
    with exporting(model, inputs), torch.no_grad():
        program = torch.export.export(inference_copy(model), inputs)
    with quiet_coremltools() as ct:
        to_edge = partial(_to_edge, _compile_specs(ct, precision, deployment))
        return lower_exported(program, Path(path), Backend("coreml_pte", to_edge))


def _compile_specs(ct: Any, precision: str, deployment: str) -> list[Any]:
    from executorch.backends.apple.coreml.compiler import CoreMLBackend

    return CoreMLBackend.generate_compile_specs(
        compute_precision=getattr(ct.precision, PRECISIONS[precision]),
        minimum_deployment_target=getattr(ct.target, deployment),
    )


def _to_edge(specs: list[Any], program: torch.export.ExportedProgram) -> Any:
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.exir import to_edge_transform_and_lower

    return to_edge_transform_and_lower(program, partitioner=[CoreMLPartitioner(compile_specs=specs)])


def extract_mlpackage(pte: str | Path, path: str | Path) -> Path:
    """Write the `.mlpackage` inside a Core ML `.pte` to `path`.

    Raises UsageError when the file holds no Core ML delegate, CannotRunHere when it holds several (the model was split).
    """
    from executorch.exir._serialize._program import _extract_delegate_payload

    pte, path = check_pte(pte), Path(path)
    try:
        payloads = [_extract_delegate_payload(pte.read_bytes(), COREML, i) for i in range(2)]
    except Exception as error:
        raise UsageError(f"{pte} cannot be read as an ExecuTorch program: {first_line(error)}") from error
    if payloads[0] is None:
        raise UsageError(f"{pte} holds no Core ML delegate: lower it with the coreml_pte target")
    if payloads[1] is not None:
        raise CannotRunHere(f"{pte} holds several Core ML delegates, so no single package stands for it: run it on a device")
    _unflatten(payloads[0], path)
    return path


def _unflatten(payload: bytes, path: Path) -> None:
    from executorch.backends.apple.coreml import executorchcoreml

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".coreml-") as folder:
        if not executorchcoreml.unflatten_directory_contents(payload, folder):
            raise EdgeIBTMError("the Core ML delegate's payload is damaged: lower the model again")
        package = next(Path(folder).rglob("*.mlpackage"), None)
        if package is None:
            raise CannotRunHere(
                "the Core ML delegate holds a compiled model, not a package: lower it with model type MODEL"
            )
        with replacing(path) as temporary:
            package.rename(temporary)


class PackageInside:
    """A Core ML `.pte` as a function: normalised images [B, 3, H, W] -> logits [B, classes] of the package inside it.

    The package is taken out once, into a temporary folder that lives as long as the object.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._folder = tempfile.TemporaryDirectory(prefix="edge-ibtm-")
        self._package = extract_mlpackage(path, Path(self._folder.name) / "inside.mlpackage")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        try:
            return run_mlpackage(self._package, images)
        except UsageError as error:
            raise type(error)(str(error).replace(str(self._package), str(self._path))) from None

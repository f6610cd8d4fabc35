"""ExecuTorch's Core ML `.pte`: an app on iOS that already runs ExecuTorch loads it; Linux can lower it but not load it.

The `.pte` carries a whole `.mlpackage` as the delegate's payload. `extract_mlpackage` takes it out again, so that the
evaluator can run here what Core ML would run there. Inputs are normalised float tensors, as for every `.pte`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.files import sha256_of, size_of
from edge_ibtm.targets.common import (
    Artifact,
    check_example,
    delegation,
    first_line,
    write_program,
)
from edge_ibtm.targets.coreml import DEPLOYMENT_TARGETS
from edge_ibtm.targets.coreml_package import replacing, run_mlpackage
from edge_ibtm.targets.coreml_tools import quiet_coremltools

if TYPE_CHECKING:
    import torch
    from torch import nn

BACKEND = "CoreMLBackend"
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
    inputs, path = check_example(example), Path(path)
    try:
        with quiet_coremltools() as ct:
            lowered, counts = _lowered(model, inputs, _compile_specs(ct, precision, deployment))
    except Exception as error:
        raise EdgeIBTMError(f"lowering to a Core ML .pte failed: {first_line(error)}") from error
    write_program(lowered, path)
    subgraphs, delegated, left, left_out = counts
    return Artifact(path, "coreml_pte", size_of(path), subgraphs, delegated, left, sha256_of(path), left_out)


def _compile_specs(ct: Any, precision: str, deployment: str) -> list[Any]:
    from executorch.backends.apple.coreml.compiler import CoreMLBackend

    return CoreMLBackend.generate_compile_specs(
        compute_precision=getattr(ct.precision, PRECISIONS[precision]),
        minimum_deployment_target=getattr(ct.target, deployment),
    )


def _lowered(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], specs: list[Any]
) -> tuple[Any, tuple[int, int, int, dict[str, int]]]:
    """(ExecuTorch program, delegation counts)."""
    import torch
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad():
        program = torch.export.export(model, inputs)
    edge = to_edge_transform_and_lower(program, partitioner=[CoreMLPartitioner(compile_specs=specs)])
    counts = delegation(edge.exported_program().graph_module)
    return edge.to_executorch(), counts


def extract_mlpackage(pte: str | Path, path: str | Path) -> Path:
    """Write the `.mlpackage` inside a Core ML `.pte` to `path`.

    Raises UsageError when the file holds no Core ML delegate, and when it holds several (the model was split).
    """
    from executorch.exir._serialize._program import _extract_delegate_payload

    pte, path = Path(pte), Path(path)
    if not pte.is_file():
        raise UsageError(f"no such file: {pte}")
    try:
        payloads = [_extract_delegate_payload(pte.read_bytes(), BACKEND, i) for i in range(2)]
    except Exception as error:
        raise UsageError(f"{pte} cannot be read as an ExecuTorch program: {first_line(error)}") from error
    if payloads[0] is None:
        raise UsageError(f"{pte} holds no Core ML delegate: lower it with the coreml_pte target")
    if payloads[1] is not None:
        raise UsageError(f"{pte} holds several Core ML delegates, so no single package stands for it")
    _unflatten(payloads[0], path)
    return path


def _unflatten(payload: bytes, path: Path) -> None:
    from executorch.backends.apple.coreml import executorchcoreml

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".coreml-") as folder:
        if not executorchcoreml.unflatten_directory_contents(payload, folder):
            raise EdgeIBTMError("the Core ML delegate's payload is damaged: lower the model again")
        package = next(Path(folder).rglob("*.mlpackage"), None)
        if package is None:
            raise UsageError(
                "the Core ML delegate holds a compiled model, not a package: lower it with model type MODEL"
            )
        with replacing(path) as temporary:
            package.rename(temporary)


def run_coreml_pte(path: str | Path, inputs: torch.Tensor) -> torch.Tensor:
    """Logits [B, classes] of the package inside a Core ML `.pte` for normalised images [B, 3, H, W]."""
    with tempfile.TemporaryDirectory() as folder:
        return run_mlpackage(extract_mlpackage(path, Path(folder) / "inside.mlpackage"), inputs)

"""XNNPACK: ExecuTorch's CPU backend for Android, iOS, macOS, Linux and Windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_ibtm.errors import EdgeIBTMError
from edge_ibtm.targets.common import (
    Artifact,
    artifact_of,
    capture,
    delegation,
    first_line,
    write_program,
)
from edge_ibtm.targets.lean import lean
from edge_ibtm.targets.runtime import run_pte

__all__ = ["lower_xnnpack", "run_pte"]


def lower_xnnpack(model: Any, inputs: tuple[torch.Tensor, ...], path: Path) -> Artifact:
    """Lower to a `.pte` whose delegated parts run in XNNPACK (fp32, or int8 where the graph is quantized)."""
    program = capture(model, inputs)
    try:
        with lean():
            edge = _to_edge(program)
            counts = delegation(edge.exported_program().graph_module)
            lowered = edge.to_executorch()
    except Exception as error:  # pass managers wrap whatever a pass raised in a bare Exception
        raise EdgeIBTMError(f"lowering to xnnpack failed: {first_line(error.__cause__ or error)}") from error
    write_program(lowered, path)
    return artifact_of(path, "xnnpack", counts)


def _to_edge(program: torch.export.ExportedProgram) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.passes.const_prop_pass import ConstPropPass

    passes = [*get_transform_passes(), ConstPropPass()]
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], transform_passes=passes)

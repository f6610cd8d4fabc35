"""ExecuTorch's portable kernels without any delegate: the fallback that runs wherever the runtime does, slowly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_ibtm.errors import EdgeIBTMError
from edge_ibtm.targets.common import Artifact, artifact_of, capture, delegation, first_line, write_program
from edge_ibtm.targets.lean import lean


def lower_portable(model: Any, inputs: tuple[torch.Tensor, ...], path: Path) -> Artifact:
    """Lower to a `.pte` of portable kernels only (fp32, or the dequantized arithmetic of a converted graph)."""
    from executorch.exir import EdgeCompileConfig, to_edge

    program = capture(model, inputs)
    try:
        with lean():
            edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
            counts = delegation(edge.exported_program().graph_module)
            lowered = edge.to_executorch()
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise EdgeIBTMError(f"lowering to portable kernels failed: {first_line(error)}") from error
    write_program(lowered, path)
    return artifact_of(path, "portable", counts)

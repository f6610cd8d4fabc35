"""ExecuTorch's portable kernels without any delegate: the fallback that runs wherever the runtime does, slowly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_ibtm.targets.common import Artifact, Backend, lower_program
from edge_ibtm.targets.lean import lean


def lower_portable(model: Any, inputs: tuple[torch.Tensor, ...], path: Path) -> Artifact:
    """Lower to a `.pte` of portable kernels only (fp32, or the dequantized arithmetic of a converted graph)."""
    return lower_program(model, inputs, path, Backend("portable", _to_edge, lean))


def _to_edge(program: torch.export.ExportedProgram) -> Any:
    from executorch.exir import EdgeCompileConfig, to_edge

    return to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))

"""torch: a `.pt2` program of torch.export, for PyTorch on CPU or CUDA (desktop, server)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_ibtm.errors import EdgeIBTMError
from edge_ibtm.files import replacing
from edge_ibtm.targets.common import Artifact, artifact_of, capture, first_line


def lower_torch(model: Any, inputs: tuple[torch.Tensor, ...], path: Path) -> Artifact:
    """Write the exported program of the rewritten model, for `torch.export.load`; nothing is delegated."""
    program = capture(model, inputs)
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    try:
        with replacing(path) as temporary, temporary.open("wb") as stream:
            torch.export.save(program, stream)
    except (OSError, RuntimeError) as error:
        raise EdgeIBTMError(f"cannot write {path}: {first_line(error)}") from error
    return artifact_of(path, "torch", (0, 0, nodes, {}))

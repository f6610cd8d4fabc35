"""Vulkan: ExecuTorch's GPU backend for Android. Lowered here; this host's runtime cannot load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edge_ibtm.errors import EdgeIBTMError
from edge_ibtm.targets.common import Artifact, artifact_of, capture, delegation, first_line, write_program


def lower_vulkan(model: Any, inputs: tuple[torch.Tensor, ...], path: Path, *, fp16: bool = False) -> Artifact:
    """Lower to a `.pte` whose delegated parts run on the GPU; fp16: compute in half precision there."""
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = capture(model, inputs)
    options = {"force_fp16": True} if fp16 else {}
    try:
        edge = to_edge_transform_and_lower(program, partitioner=[VulkanPartitioner(options)])
        counts = delegation(edge.exported_program().graph_module)
        lowered = edge.to_executorch()
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise EdgeIBTMError(f"lowering to vulkan failed: {first_line(error)}") from error
    write_program(lowered, path)
    return artifact_of(path, "vulkan", counts)

"""Vulkan: ExecuTorch's GPU backend for Android. Lowered here; this host's runtime cannot load it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from edge_ibtm.targets.common import Artifact, Backend, lower_program


def lower_vulkan(model: Any, inputs: tuple[torch.Tensor, ...], path: Path, *, fp16: bool = False) -> Artifact:
    """Lower to a `.pte` whose delegated parts run on the GPU; fp16: compute in half precision there."""
    to_edge = partial(_to_edge, {"force_fp16": True} if fp16 else {})
    return lower_program(model, inputs, path, Backend("vulkan", to_edge))  # not `lean`: its passes are unproved under it


def _to_edge(options: dict[str, Any], program: torch.export.ExportedProgram) -> Any:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    from executorch.exir import to_edge_transform_and_lower

    return to_edge_transform_and_lower(program, partitioner=[VulkanPartitioner(options)])

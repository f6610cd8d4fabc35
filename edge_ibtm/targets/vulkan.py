"""Vulkan: ExecuTorch's GPU backend for Android. Lowered here; this host's runtime cannot load it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from edge_ibtm.targets.common import Artifact, Backend, lower_program


def lower_vulkan(model: Any, inputs: tuple[torch.Tensor, ...], path: Path, *, fp16: bool = False) -> Artifact:
    """Lower to a `.pte` whose delegated parts run on the GPU; fp16: compute in half precision there."""
    to_edge = partial(_to_edge, {"force_fp16": True} if fp16 else {})
    backend = Backend("vulkan", to_edge, true_unsqueezes)  # not `lean`: its passes are unproved under it
    return lower_program(model, inputs, path, backend)


@contextmanager
def true_unsqueezes() -> Iterator[None]:
    """While the block runs, ExecuTorch's pass makes an unsqueeze only of a view that is one.

    It takes any view with one more axis of size 1 for one, such as [9, 1] -> [1, 1, 9], and what it makes of that has
    another shape. Such a view stays a view, which the backend runs as well.
    """
    from executorch.backends.transforms.view_copy_to_squeeze_unsqueeze import ViewCopyToSqueezeUnsqueezePass as Pass

    with patch.object(Pass, "find_unsqueeze_dim", _checked(Pass.find_unsqueeze_dim)):
        yield


def _checked(find: Callable[..., int | None]) -> Callable[..., int | None]:
    """`find`, with None instead of an axis whose removal from the new shape does not leave the old one."""

    def checked(self: Any, old: Sequence[int], new: Sequence[int]) -> int | None:
        axis = find(self, old, new)
        if axis is None:
            return None
        left = list(new)
        left.pop(axis)
        return axis if left == list(old) else None

    return checked


def _to_edge(options: dict[str, Any], program: torch.export.ExportedProgram) -> Any:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    from executorch.exir import to_edge_transform_and_lower

    return to_edge_transform_and_lower(program, partitioner=[VulkanPartitioner(options)])

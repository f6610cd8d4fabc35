"""XNNPACK: ExecuTorch's CPU backend for Android, iOS, macOS, Linux and Windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_ibtm.rewrite_pieces import in_pieces
from edge_ibtm.rewrite_windows import attention_on_maps
from edge_ibtm.rewrite_winograd import winograd
from edge_ibtm.targets.common import Artifact, Backend, lower_program
from edge_ibtm.targets.lean import lean
from edge_ibtm.targets.runtime import run_pte

__all__ = ["lower_xnnpack", "run_pte"]


def lower_xnnpack(model: Any, inputs: tuple[torch.Tensor, ...], path: Path) -> Artifact:
    """Lower to a `.pte` whose delegated parts run in XNNPACK (fp32, or int8 where the graph is quantized)."""
    return lower_program(model, inputs, path, Backend("xnnpack", _to_edge, _context, _further))


@contextmanager
def _context() -> Iterator[None]:
    from edge_ibtm.targets.xnnpack_graph import simplified

    with lean(), simplified():
        yield


def _further(model: nn.Module) -> nn.Module:
    return in_pieces(attention_on_maps(winograd(model)))


def _to_edge(program: torch.export.ExportedProgram) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.passes.const_prop_pass import ConstPropPass

    passes = [*get_transform_passes(), ConstPropPass()]
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], transform_passes=passes)

"""What all targets share: the artifact record, capture, lowering, delegation counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import executorch.kernels.quantized  # noqa: F401  8-bit operators outside a delegate, for lowering and for running
import torch
from torch import nn

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.files import replacing, sha256_of, size_of
from edge_ibtm.rewrite import Rewrite


@dataclass(frozen=True)
class Artifact:
    """A lowered model: where it is, what it weighs (bytes), how much of it the delegate took (nodes)."""

    path: Path
    target: str
    bytes: int
    subgraphs: int
    delegated: int
    non_delegated: int
    sha256: str
    left_out: dict[str, int] = field(default_factory=dict)


def artifact_of(path: Path, target: str, counts: tuple[int, int, int, dict[str, int]]) -> Artifact:
    """The record of a written artifact; counts as `delegation` gives them."""
    return Artifact(path, target, size_of(path), *counts[:3], sha256_of(path), counts[3])


def check_example(example: Any) -> tuple[torch.Tensor, ...]:
    """The example inputs as a tuple of tensors; UsageError for anything else."""
    inputs = example if isinstance(example, (tuple, list)) else (example,)
    if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs) or "nothing"
        raise UsageError(f"the example must be a tensor or a tuple of tensors, got {kinds}")
    return tuple(inputs)


def check_floating(images: torch.Tensor) -> None:
    """UsageError for images [B, C, H, W] of integers: models compute on normalised ones."""
    if images.ndim == 4 and not images.is_floating_point():
        raise UsageError(
            f"images must be floating point, got {images.dtype} of shape {tuple(images.shape)}; first scale them to 0..1 "
            "(images / 255) and normalise them as the model's training did"
        )


def check_alike(batches: Sequence[torch.Tensor], what: str) -> None:
    """UsageError unless the images of all batches are of one shape."""
    shapes = sorted({tuple(images.shape[1:]) for images in batches})
    if len(shapes) > 1:
        raise UsageError(f"{what} are of several shapes, {shapes}; give all in the one of the artifact")


def is_captured(model: nn.Module) -> TypeGuard[torch.fx.GraphModule]:
    """Whether `model` is already a graph module (a converted PT2E model), not an eager one."""
    return isinstance(model, torch.fx.GraphModule)


def capture(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], further: Rewrite | None = None
) -> torch.export.ExportedProgram:
    """torch.export of the rewritten copy of an eager module (see `export_rewritten`), or of a graph module as it is."""
    from edge_ibtm.rewrite import export_rewritten
    from edge_ibtm.rewrite_graph import own_constants

    with exporting(model, inputs):
        if not is_captured(model):
            return own_constants(export_rewritten(model, inputs, further))
        with torch.no_grad():
            return own_constants(torch.export.export(model, inputs))


@contextmanager
def exporting(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """What torch.export, or the model on `inputs`, complains about, as one line that names both.

    Errors: EdgeIBTMError; UsageError for a quantized graph that was captured in another shape than the inputs'.
    """
    given = [tuple(x.shape) for x in inputs]
    taken = _captured_shapes(model)
    if taken and taken != given:
        raise UsageError(
            f"the graph was captured for inputs of {taken}, got {given}; quantize with calibration batches of the shape "
            "to be lowered, such as list(images.split(1))"
        )
    try:
        yield
    except EdgeIBTMError:
        raise
    except Exception as error:  # a model may raise anything
        shapes = ", ".join(map(str, given))
        raise EdgeIBTMError(f"torch.export of {type(model).__name__} on {shapes} failed: {first_line(error)}") from error


def _captured_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """The input shapes a graph module was captured for; empty for an eager module."""
    if not is_captured(model):
        return []
    values = [node.meta.get("val") for node in model.graph.find_nodes(op="placeholder")]
    return [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


ALIGNMENT = 16  # bytes, what delegates ask of constants; ExecuTorch's 128 leave half of that behind each of some hundreds


@dataclass(frozen=True)
class Backend:
    """An ExecuTorch target: `to_edge` takes an exported program to an edge program manager, inside `context()`.

    further: a rewrite of eager modules that only this target gains by.
    """

    name: str
    to_edge: Callable[[Any], Any]
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    further: Rewrite | None = None


def lower_program(model: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path, backend: Backend) -> Artifact:
    """Capture, lower, write: what every ExecuTorch target does. EdgeIBTMError when any step fails."""
    return lower_exported(capture(model, inputs, backend.further), path, backend)


def lower_exported(program: torch.export.ExportedProgram, path: Path, backend: Backend) -> Artifact:
    """Lower and write what was captured. EdgeIBTMError when either fails."""
    from executorch.exir import ExecutorchBackendConfig

    try:
        with backend.context():
            edge = backend.to_edge(program)
            counts = delegation(edge.exported_program().graph_module)
            lowered = edge.to_executorch(ExecutorchBackendConfig(segment_alignment=ALIGNMENT))
    except Exception as error:  # pass managers wrap whatever a pass raised in a bare Exception that names the pass
        where = re.search(r"running the '([^']+)' pass", str(error))
        place = f" in {where[1]}" if where else ""
        raise EdgeIBTMError(f"lowering to {backend.name} failed{place}: {first_line(error.__cause__ or error)}") from error
    write_program(lowered, path)
    return artifact_of(path, backend.name, counts)


def write_program(program: Any, path: Path) -> None:
    """Write an ExecuTorch program under its final name only when complete; EdgeIBTMError if the disk refuses."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as stream:
            program.write_to_file(stream)
    except OSError as error:
        raise EdgeIBTMError(f"cannot write {path}: {error.strerror or error}") from error


def delegation(graph_module: torch.fx.GraphModule) -> tuple[int, int, int, dict[str, int]]:
    """(subgraphs, delegated nodes, other nodes, {operator: nodes} of what was left out) of a lowered graph.

    A getitem, which picks one output of a delegate or of an operator, is no instruction of the program and does not count.
    """
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(graph_module)
    left = {
        name: row.non_delegated
        for name, row in info.delegation_by_operator.items()
        if row.non_delegated and "getitem" not in name
    }
    counts = info.num_delegated_subgraphs, info.num_delegated_nodes, sum(left.values())
    return (*counts, dict(sorted(left.items(), key=lambda item: -item[1])))


def run_pte(path: str | Path, inputs: Any, threads: int | None = None) -> list[torch.Tensor]:
    """`edge_ibtm.targets.runtime.run_pte`."""
    from edge_ibtm.targets import runtime

    return runtime.run_pte(path, inputs, threads)

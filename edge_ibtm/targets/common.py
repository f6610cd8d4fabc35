"""What all targets share: the artifact record, capture, atomic writing, the ExecuTorch runtime."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_ibtm.errors import EdgeIBTMError, UsageError


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


def check_example(example: Any) -> tuple[torch.Tensor, ...]:
    """The example inputs as a tuple of tensors; UsageError for anything else."""
    inputs = example if isinstance(example, (tuple, list)) else (example,)
    if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs) or "nothing"
        raise UsageError(f"the example must be a tensor or a tuple of tensors, got {kinds}")
    return tuple(inputs)


def is_captured(model: nn.Module) -> bool:
    """Whether `model` is already a graph module (a converted PT2E model), not an eager one."""
    return isinstance(model, torch.fx.GraphModule)


def capture(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    """torch.export of the rewritten copy of an eager module, or of a graph module as it is."""
    from edge_ibtm.rewrite import export_rewritten

    try:
        if not is_captured(model):
            return export_rewritten(model, inputs)
        with torch.no_grad():
            return torch.export.export(model, inputs)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise EdgeIBTMError(f"torch.export of {type(model).__name__} on {shapes} failed: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder in order of their names."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def write_program(program: Any, path: Path) -> None:
    """Write an ExecuTorch program under its final name only when complete; EdgeIBTMError if the disk refuses."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as stream:
            program.write_to_file(stream)
    except OSError as error:
        raise EdgeIBTMError(f"cannot write {path}: {error.strerror or error}") from error


def run_pte(path: str | Path, inputs: Any, threads: int | None = None) -> list[torch.Tensor]:
    """Outputs of the `forward` method of a `.pte` in this host's ExecuTorch runtime.

    inputs: a tensor or a tuple of tensors of the shapes it was lowered with. threads: size of the thread pool.
    Raises UsageError for a file that is no `.pte`, a backend this host lacks, or a wrong shape or dtype.
    """
    tensors = check_example(inputs)
    method = load_pte(path, threads)
    check_inputs(method, tensors)
    try:
        return list(method.execute(tensors))
    except RuntimeError as error:
        raise EdgeIBTMError(f"{path} failed to run: {first_line(error)}") from error


def load_pte(path: str | Path, threads: int | None = None) -> Any:
    """The loaded `forward` method of a `.pte`, after its header and backends were checked."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    file = check_pte(path)
    if threads:
        _unsafe_reset_threadpool(threads)
    try:
        program = Runtime.get().load_program(file.read_bytes())
        if "forward" not in program.method_names:
            raise UsageError(f"{file} has no method 'forward', only {sorted(program.method_names)}")
        method = program.load_method("forward")
    except RuntimeError as error:
        raise UsageError(f"{file} cannot be loaded: {_load_hint(file, error)}") from error
    method.program = program
    return method


def check_pte(path: str | Path) -> Path:
    """The path of what is a whole `.pte` by its header; UsageError if it is missing, foreign or truncated."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no such file: {file}")
    with file.open("rb") as stream:
        head = stream.read(64)
    if len(head) < 32 or head[4:6] != b"ET":
        raise UsageError(f"{file} is not an ExecuTorch program (.pte): its header reads {head[4:8]!r}, not b'ET12'")
    if head[8:10] == b"eh":
        length = int.from_bytes(head[12:16], "little")
        program = int.from_bytes(head[16:24], "little")
        segments = int.from_bytes(head[24:32], "little")
        tail = int.from_bytes(head[32:40], "little") if length >= 32 else 0
        needed = segments + tail if segments else program
        if file.stat().st_size < needed:
            raise UsageError(f"{file} is truncated: {file.stat().st_size} bytes of {needed}; lower the model again")
    return file


def check_inputs(method: Any, tensors: Sequence[torch.Tensor]) -> None:
    """UsageError unless the tensors have the count, shapes and dtypes the method was lowered with."""
    meta = method.metadata
    if meta.num_inputs() != len(tensors):
        raise UsageError(f"the artifact takes {meta.num_inputs()} inputs, got {len(tensors)}")
    for index, tensor in enumerate(tensors):
        wanted = tuple(meta.input_tensor_meta(index).sizes())
        if tuple(tensor.shape) != wanted:
            raise UsageError(f"input {index} has shape {tuple(tensor.shape)}, the artifact takes {wanted}")


def _load_hint(file: Path, error: RuntimeError) -> str:
    from executorch.runtime import Runtime

    content = file.read_bytes()
    here = Runtime.get().backend_registry
    for backend in ("VulkanBackend", "CoreMLBackend", "QnnBackend", "XnnpackBackend"):
        if backend.encode() in content and not here.is_available(backend):
            return f"it needs {backend}, which this host's runtime lacks; run it on a device that has it"
    return first_line(error)


def delegation(graph_module: torch.fx.GraphModule) -> tuple[int, int, int, dict[str, int]]:
    """(subgraphs, delegated nodes, other nodes, {operator: nodes} of what was left out) of a lowered graph."""
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(graph_module)
    left = {
        name: row.non_delegated
        for name, row in info.delegation_by_operator.items()
        if row.non_delegated and "getitem" not in name
    }
    counts = info.num_delegated_subgraphs, info.num_delegated_nodes, info.num_non_delegated_nodes
    return (*counts, dict(sorted(left.items(), key=lambda item: -item[1])))

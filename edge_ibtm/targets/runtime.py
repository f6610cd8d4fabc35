"""This host's ExecuTorch runtime: loading and running `.pte` files, with errors that say what is wrong with the file."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.files import check_pte, save_tensors
from edge_ibtm.scalar_types import SCALAR_TYPES
from edge_ibtm.targets.common import check_example, first_line

COREML = "CoreMLBackend"


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


@dataclass(frozen=True)
class Loaded:
    """The `forward` method of a program, which has to outlive it (executorch 1.5.1 runs freed memory otherwise).

    Weights are freed with the last reference: a method that held its program, which holds its methods, would keep them
    until Python's collector runs, and that does not see how large they are.
    """

    program: Any

    @property
    def metadata(self) -> Any:
        return self.program.metadata("forward")

    def execute(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Outputs, in memory that the next run writes again."""
        return self.program.load_method("forward").execute(inputs)  # type: ignore[no-any-return]


def load_pte(path: str | Path, threads: int | None = None) -> Loaded:
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
        program.load_method("forward")
    except RuntimeError as error:
        raise UsageError(f"{file} cannot be loaded: {_load_hint(file, error)}") from error
    return Loaded(program)


def check_inputs(method: Any, tensors: Sequence[torch.Tensor]) -> None:
    """UsageError unless the tensors have the count, shapes and dtypes the method was lowered with."""
    meta = method.metadata
    if meta.num_inputs() != len(tensors):
        raise UsageError(f"the artifact takes {meta.num_inputs()} inputs, got {len(tensors)}")
    for index, tensor in enumerate(tensors):
        spec = meta.input_tensor_meta(index)
        wanted, dtype = tuple(spec.sizes()), getattr(torch, SCALAR_TYPES[spec.dtype()])
        if (tuple(tensor.shape), tensor.dtype) != (wanted, dtype):
            has = f"shape {tuple(tensor.shape)} and type {tensor.dtype}"
            raise UsageError(f"input {index} has {has}, the artifact takes {wanted} and {dtype}")


def _load_hint(file: Path, error: RuntimeError) -> str:
    backend = lacking_backend(file)
    if backend is None:
        return first_line(error)
    return f"it needs {backend}, which this host's runtime lacks; run it on a device that has it"


def lacking_backend(file: Path) -> str | None:
    """The backend that a `.pte` names and this host's runtime lacks."""
    from executorch.runtime import Runtime

    content, here = file.read_bytes(), Runtime.get().backend_registry
    known = ("VulkanBackend", COREML, "QnnBackend", "XnnpackBackend")
    return next((name for name in known if name.encode() in content and not here.is_available(name)), None)


def holds_coreml(path: Path) -> bool:
    """Whether a `.pte` wants Core ML, which this host's runtime lacks."""
    return lacking_backend(check_pte(path)) == COREML


def operators_of(path: Path) -> list[str]:
    """Names of the operators outside delegates that a `.pte` calls, as `aten::add.out`."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    parsed = deserialize_pte_binary(path.read_bytes())
    program = getattr(parsed, "program", parsed)
    found = {(op.name, op.overload) for plan in program.execution_plan for op in plan.operators}
    return sorted(f"{name}.{overload}" if overload else name for name, overload in found)


def missing_kernels(path: Path) -> list[str]:
    """Operators of a `.pte` that this host's stock runtime has no kernel for."""
    from executorch.runtime import Runtime

    here = Runtime.get().operator_registry.operator_names
    return [name for name in operators_of(path) if name not in here]


def run_isolated(path: Path, images: torch.Tensor, timeout: float = 600.0) -> torch.Tensor:
    """Outputs of a `.pte` run in a child process, so that an abort of native code becomes an EdgeIBTMError.

    images [B, ...] in pieces of the lowered batch; timeout in seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder, "in.pt"), Path(folder, "out.pt")
        save_tensors(images, given)
        command = [sys.executable, "-m", "edge_ibtm.targets.runtime", str(path), str(given), str(answer)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise EdgeIBTMError(f"{path} did not finish within {timeout:.0f} s") from error
        if child.returncode == 0:
            return torch.load(answer, weights_only=True)
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        if child.returncode < 0:
            raise EdgeIBTMError(f"running {path} killed its process (signal {-child.returncode}): {last}")
        if child.returncode == UsageError.exit_code:
            raise UsageError(last)
        raise EdgeIBTMError(last)


def batch_runner(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function images [B, ...] -> first output of a `.pte`, run in pieces of the lowered batch; the file is loaded once."""
    method = load_pte(path)
    size = method.metadata.input_tensor_meta(0).sizes()[0]

    def run(images: torch.Tensor) -> torch.Tensor:
        pieces = [piece.contiguous() for piece in images.split(size)]
        for piece in (pieces[0], pieces[-1]):
            check_inputs(method, (piece,))
        try:
            return torch.cat([method.execute((piece,))[0].clone() for piece in pieces])
        except RuntimeError as error:
            raise EdgeIBTMError(f"{path} failed to run: {first_line(error)}") from error

    return run


def _child(arguments: list[str]) -> int:
    path, given, answer = arguments
    try:
        torch.save(batch_runner(Path(path))(torch.load(given, weights_only=True)), answer)
    except EdgeIBTMError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1:]))

"""The child process of a host probe: loads .pte files in the ExecuTorch runtime and times them.

`python -m edge_ibtm.probe.child REQUEST.json`. It runs apart because native code may abort: the parent then
sees a signal and the last lines of stderr. The answer is a JSON file: {"results": [...]} or {"error":
message, "usage": bool}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.orphans import end_with_parent
from edge_ibtm.probe import facts
from edge_ibtm.probe.loop import ProbeOptions, sample_rounds, timed_ms, warm_up
from edge_ibtm.scalar_types import SCALAR_TYPES

ERROR_NAMES = {
    0x01: "internal error",
    0x02: "invalid state",
    0x10: "not supported",
    0x11: "not implemented",
    0x12: "invalid argument",
    0x13: "invalid type",
    0x14: "operator missing from this runtime",
    0x20: "not found (backend or method missing from this runtime)",
    0x21: "out of memory",
    0x22: "access failed",
    0x23: "invalid program",
    0x24: "invalid external data",
    0x25: "out of resources",
    0x30: "delegate is incompatible with this runtime",
    0x31: "delegate out of memory",
    0x32: "delegate has an invalid handle",
}


class _Model:
    """One loaded program, its inputs and what loading cost."""

    def __init__(self, path: str, inputs: list[Any], etdump: bool = False) -> None:
        self.path, self.inputs = Path(path), inputs
        before = facts.memory_mb("VmRSS")
        facts.reset_peak()
        self.program: Any = None
        self.method: Any = None
        self.read_ms = timed_ms(lambda: self._load(etdump))
        self.init_ms = timed_ms(self._init)
        self._check_inputs()
        self.first_ms = timed_ms(self.run)
        peak = facts.memory_mb("VmHWM")
        self.growth_mb = None if before is None or peak is None else max(0.0, peak - before)

    def _load(self, etdump: bool) -> None:
        self.program = load_program(self.path, etdump)

    def _init(self) -> None:
        names = sorted(self.program.method_names)
        if "forward" not in names:
            raise UsageError(f"{self.path} has no method 'forward', only {', '.join(names)}")
        try:
            self.method = self.program.load_method("forward")
        except RuntimeError as error:
            raise EdgeIBTMError(f"{self.path} does not load here: {_reason(error)}") from None

    def _check_inputs(self) -> None:
        """Say what the program wants before the runtime refuses with a number only."""
        meta = self.program.metadata("forward")
        if meta.num_inputs() != len(self.inputs):
            raise UsageError(f"{self.path} takes {meta.num_inputs()} inputs, {len(self.inputs)} given")

    def run(self) -> list[Any]:
        """One inference; UsageError when the inputs do not fit."""
        try:
            return list(self.method.execute(self.inputs))
        except RuntimeError as error:
            meta = self.program.metadata("forward")
            infos = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
            want = [f"{list(info.sizes())} torch.{SCALAR_TYPES[info.dtype()]}" for info in infos]
            have = [f"{list(x.shape)} {x.dtype}" for x in self.inputs]
            raise UsageError(f"{self.path} does not run on {have} ({_reason(error)}); it takes {want}") from None


def load_program(path: Path, etdump: bool = False) -> Any:
    """The runtime's `Program`, or UsageError when the file is none."""
    from executorch.runtime import Runtime

    try:
        return Runtime.get().load_program(path, enable_etdump=etdump)
    except RuntimeError as error:
        raise UsageError(f"{path} is not a program this runtime can read ({_reason(error)}); lower it again") from None


def _reason(error: Exception) -> str:
    """The runtime's error number in words."""
    text = str(error)
    number = text.rsplit("0x", 1)[-1].lstrip(":").split()[0] if "0x" in text else ""
    try:
        return f"{ERROR_NAMES[int(number, 16)]}, error 0x{number}"
    except (ValueError, KeyError):
        return text


def _skip_exporter() -> None:
    """Keep the runtime's bindings from importing the whole exporter (two thirds of this process's start and
    memory).

    They want one decorator of `executorch.exir._warnings`; the package around it imports torch._dynamo and
    inductor. An empty package with the real search path lets the one module load alone.
    """
    from importlib.util import find_spec
    from types import ModuleType

    spec = find_spec("executorch")
    if spec is not None and "executorch.exir" not in sys.modules:
        package = ModuleType("executorch.exir")
        package.__path__ = [str(Path(place) / "exir") for place in spec.submodule_search_locations or []]
        sys.modules["executorch.exir"] = package


def _start(request: dict[str, Any]) -> Any:
    """The runtime's bindings, with all kernels registered and the thread pool sized."""
    _skip_exporter()
    _register_kernels()
    from executorch.extension.pybindings import portable_lib as runtime

    runtime._unsafe_reset_threadpool(request["threads"])
    return runtime


def _execute(request: dict[str, Any]) -> tuple[list[_Model], list[Any]]:
    """Load every program and run it once; inputs and outputs are saved for the parent."""
    import torch

    given = torch.load(request["inputs"], weights_only=True)
    inputs = [one or random_inputs(path) for one, path in zip(given, request["paths"], strict=True)]
    models = [_Model(path, inputs[i]) for i, path in enumerate(request["paths"])]
    outputs = [model.run() for model in models]
    torch.save({"inputs": inputs, "outputs": outputs}, request["outputs"])
    return models, inputs


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run, time when asked to, and trace last: tracing must not touch the samples or the peak memory."""
    runtime = _start(request)
    models, inputs = _execute(request)
    answer = _measure(models, ProbeOptions(**request["options"])) if request["measure"] else {}
    answer["threads"] = runtime._threadpool_get_thread_count()
    if request["trace_runs"]:
        _trace(request, inputs)
    return answer


def _measure(models: list[_Model], options: ProbeOptions) -> dict[str, Any]:
    warm = [warm_up(model.run, options) for model in models]
    before = facts.condition()
    samples = sample_rounds([model.run for model in models], options)
    after = facts.condition()
    return {
        "peak_rss_mb": facts.peak_rss_mb(),
        "before": before,
        "after": after,
        "results": [_row(m, w, s) for m, w, s in zip(models, warm, samples, strict=True)],
    }


def random_inputs(path: str) -> list[Any]:
    """Inputs of the shapes and types that the program declares: seeded normal noise, cut to the type."""
    import torch

    meta = load_program(Path(path)).metadata("forward")
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for index in range(meta.num_inputs()):
        spec = meta.input_tensor_meta(index)
        values = torch.randn(spec.sizes(), generator=generator)
        inputs.append(values.to(getattr(torch, SCALAR_TYPES[spec.dtype()])))
    return inputs


def _register_kernels() -> None:
    """Quantized operators outside the delegate have their kernels in a library of their own."""
    try:
        import executorch.kernels.quantized  # noqa: F401
    except (ImportError, OSError):
        print(
            "no quantized kernel library; quantized operators outside a delegate will be missing",
            file=sys.stderr,
        )


def _row(model: _Model, warm: tuple[int, bool], samples: list[float]) -> dict[str, Any]:
    return {
        "load_ms": model.read_ms + model.init_ms,
        "init_ms": model.init_ms,
        "first_ms": model.first_ms,
        "rss_growth_mb": model.growth_mb,
        "warmup_runs": warm[0],
        "stable": warm[1],
        "samples_ms": samples,
    }


def _trace(request: dict[str, Any], inputs: list[Any]) -> None:
    """A second, instrumented load and run of each model: tracing must not touch the samples."""
    for index, path in enumerate(request["paths"]):
        model = _Model(path, inputs[index], etdump=True)
        for _ in range(request["trace_runs"] - 1):
            model.run()
        model.program.write_etdump_result_to_file(request["etdump"][index], request["etdump"][index] + ".debug")


def main(request_path: str) -> None:
    """Carry out one request and write its answer."""
    end_with_parent()
    request = json.loads(Path(request_path).read_text())
    try:
        answer = _answer(request)
    except EdgeIBTMError as error:
        answer = {"error": str(error), "usage": isinstance(error, UsageError)}
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])

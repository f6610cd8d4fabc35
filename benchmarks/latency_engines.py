"""Loading one variant in its engine and timing all of them round-robin, in a process with a fixed number of threads.

`python benchmarks/latency_engines.py REQUEST.json` prints one JSON line: {results: {variant name: {samples or error}},
cores_ns: what `latency_cores.py` says before every round}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from latency_cores import NEAR  # noqa: E402
from latency_variants import Variant, model_of  # noqa: E402

Run = Callable[[], Any]
SPIN = 0.3  # s; idle OpenMP workers keep a core busy for up to 0.2 s, which would slow whatever is timed next
WARM = 0.05  # s of untimed runs before each timed one: what a pause or another model's weights left behind is gone by then
PATIENCE, POLL = 1500.0, 0.5  # s: for all rounds, and between two looks at the cores


def _torch(request: dict[str, Any], variant: Variant, image: Any) -> Run:
    import torch

    model = model_of(request["model"], request["size"], variant, request["keep_ratio"])
    if variant.engine == "compile":
        model = torch.compile(model)

    def run() -> Any:
        with torch.inference_mode():
            return model(image)

    return run


def _executorch(request: dict[str, Any], variant: Variant, image: Any) -> Run:
    from edge_ibtm.targets.runtime import load_pte

    method = load_pte(Path(request["folder"]) / variant.file, request["threads"])
    return lambda: method.execute((image,))


def _onnxruntime(request: dict[str, Any], variant: Variant, image: Any) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = request["threads"], 1
    path = str(Path(request["folder"]) / variant.file)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, given)


def _openvino(request: dict[str, Any], variant: Variant, image: Any) -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": request["threads"], "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    compiled = openvino.Core().compile_model(str(Path(request["folder"]) / variant.file), "CPU", settings)
    asked, given = compiled.create_infer_request(), image.numpy()
    return lambda: asked.infer([given])


def _litert(request: dict[str, Any], variant: Variant, image: Any) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(Path(request["folder"]) / variant.file), num_threads=request["threads"])
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image.numpy())
    return interpreter.invoke  # type: ignore[no-any-return]


ENGINES = {
    "torch": _torch, "compile": _torch, "executorch": _executorch, "onnxruntime": _onnxruntime, "openvino": _openvino,
    "litert": _litert,
}  # fmt: skip


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load every variant, warm all up, then time one run of each a round. Milliseconds.

    Each timed run follows untimed ones of the same variant, for an app runs one model again and again; with more threads a
    pause follows engines that spin. Where the request wants cores `near` each other or `far` apart, a round waits for that,
    and is dropped where it ends otherwise; after PATIENCE there are as many rounds as there are.
    """
    import torch

    torch.set_num_threads(request["threads"])
    image = torch.randn(1, 3, request["size"], request["size"], generator=torch.Generator().manual_seed(0))
    runs, results = _loaded(request, image)
    pauses = {v["name"]: SPIN * (v["engine"] != "executorch" and request["threads"] > 1) for v in request["variants"]}
    for _ in range(request["warmup"]):
        _round(runs, pauses)
    wanted, until = request["cores"], time.monotonic() + PATIENCE
    apart: list[float | None] = []
    dropped = 0
    while len(apart) < request["repeats"] and time.monotonic() < until:
        before = _cores_apart() if request["threads"] > 1 else None
        if not _is(before, wanted):
            time.sleep(POLL)
            continue
        taken = _round(runs, pauses)
        if wanted != "any" and not _is(_cores_apart(), wanted):
            dropped += 1
            continue
        apart.append(before)
        for name, ms in taken.items():
            results[name]["samples"].append(ms)
    return {"results": results, "cores_ns": apart, "dropped": dropped}


def _round(runs: dict[str, Run], pauses: dict[str, float]) -> dict[str, float]:
    """One run of every variant, ms."""
    taken = {}
    for name, run in runs.items():
        until = time.perf_counter() + WARM
        run()
        while time.perf_counter() < until:
            run()
        start = time.perf_counter()
        run()
        taken[name] = round(1e3 * (time.perf_counter() - start), 4)
        time.sleep(pauses[name])
    return taken


def _is(apart: float | None, wanted: str) -> bool:
    """Whether cores are as near or far as wanted; where nothing tells, they are neither."""
    return wanted == "any" or (apart is not None and (apart < NEAR) == (wanted == "near"))


def _loaded(request: dict[str, Any], image: Any) -> tuple[dict[str, Run], dict[str, Any]]:
    """Every variant that loads and runs once, and by name what that took, or the error."""
    runs: dict[str, Run] = {}
    results: dict[str, Any] = {}
    for given in request["variants"]:
        variant = Variant(**given)
        try:
            start = time.perf_counter()
            run = ENGINES[variant.engine](request, variant, image)
            loaded = time.perf_counter()
            run()
            first = time.perf_counter()
        except Exception as error:
            results[variant.name] = {"error": (str(error).splitlines() or [type(error).__name__])[0][:200]}
            continue
        runs[variant.name] = run
        results[variant.name] = {"load_ms": 1e3 * (loaded - start), "first_ms": 1e3 * (first - loaded), "samples": []}
    return runs, results


def _cores_apart() -> float | None:
    """Round trip between two cores, ns, None where nothing tells; looked at from a process without this one's threads."""
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("latency_cores.py"))], capture_output=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    print("RESULT " + json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))

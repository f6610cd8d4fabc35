"""Latency of our exports against what a user would pick instead, interleaved in one run.

    python benchmarks/latency.py                                            # everything, about an hour, mostly lowering
    python benchmarks/latency.py --models mobilevit_s --threads 1 --repeats 20 --mergers ibtm --densities "" --no-int8
    python benchmarks/latency.py --threads 2 --cores near                   # only rounds whose two cores share a cache
    python benchmarks/latency.py --prepare                                  # only make the artifacts
    python benchmarks/latency.py --table                                    # only write docs/LATENCY.md from the JSON

The engines compared are not dependencies: pip install onnx onnxruntime openvino ai-edge-litert. LiteRT's converter wants an
older pydantic than edge_ibtm, so it gets an environment of its own: pip install litert-torch timm there, its Python as
`--litert-python`. An engine that is not installed is left out, with a line that says so.

Artifacts are kept under runs/latency and made once; results go to benchmarks/results/latency, one file a model, number
of threads and wanted distance of cores. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from latency_cores import round_trip_ns  # noqa: E402
from latency_report import ratio, write_tables  # noqa: E402
from latency_variants import SIZES, Variant, make_file, variants  # noqa: E402

RESULTS = HERE / "results" / "latency"
MODELS = "mobilevit_s,efficientvit_b1,vit_small,swin_tiny"


def parser() -> argparse.ArgumentParser:
    """Command line of the benchmark."""
    def names(text: str) -> list[str]:
        return [n for n in text.split(",") if n]

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=names, default=names(MODELS))
    p.add_argument("--threads", type=lambda t: [int(n) for n in names(t)], default=[1, 2])
    p.add_argument("--repeats", type=int, default=60, help="rounds")
    p.add_argument("--warmup", type=int, default=5, help="rounds that are not counted")
    p.add_argument("--cores", choices=("any", "near", "far"), default="any", help="with 2 threads, only rounds with such cores")
    p.add_argument("--keep-ratio", type=float, default=0.7)
    p.add_argument("--size", type=int, help="pixels; default 256 for MobileViT, else 224")
    p.add_argument("--mergers", type=names, default=names("ibtm,tome,tofu,ltmp,uniform"))
    p.add_argument("--densities", type=names, default=names("block,stage,once"))
    p.add_argument("--engines", type=names, default=names("torch,compile,onnxruntime,openvino,litert"))
    p.add_argument("--litert-python", default=sys.executable, help="Python with litert-torch and timm, to convert with")
    p.add_argument("--no-int8", action="store_true")
    p.add_argument("--prepare", action="store_true", help="make the artifacts and stop")
    p.add_argument("--table", action="store_true", help="write the tables and stop")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON records, one for each host")
    p.add_argument("--to", type=Path, default=HERE.parent / "docs" / "LATENCY.md")
    p.add_argument("--one", help=argparse.SUPPRESS)
    return p


def prepare(args: argparse.Namespace, model: str) -> tuple[Path, dict[str, Any]]:
    """Make the artifacts of a model, each in a process of its own; returns their folder and facts by variant name."""
    size = args.size or SIZES.get(model, 224)
    folder = HERE.parent / "runs" / "latency" / f"{model}_{size}_r{args.keep_ratio:g}"
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    for variant in variants(model, args.mergers, args.densities, args.engines, not args.no_int8):
        request = json.dumps([model, size, asdict(variant), args.keep_ratio, str(folder)])
        python = args.litert_python if variant.engine == "litert" else sys.executable
        command = [python, str(HERE / "latency.py"), "--one", request]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["?"])[-1]
            print(f"{model}: {variant.name} cannot be made: {last[:200]}", file=sys.stderr)
            continue
        facts[variant.name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{model}: {variant.name} ready ({facts[variant.name]['make_cpu_s']} s of CPU)", flush=True)
    return folder, facts


def make_one(request: str) -> None:
    """Child: make one artifact, print its facts."""
    model, size, variant, keep_ratio, folder = json.loads(request)
    print(json.dumps(make_file(model, size, Variant(**variant), keep_ratio, Path(folder))))


def run(args: argparse.Namespace, model: str, threads: int, made: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """Time all variants of a model in one child process; the record is written to `--results`."""
    folder, facts = made
    chosen = [v for v in variants(model, args.mergers, args.densities, args.engines, not args.no_int8) if v.name in facts]
    cores = args.cores if threads > 1 else "any"
    request = {
        "model": model, "size": args.size or SIZES.get(model, 224), "threads": threads, "cores": cores, "folder": str(folder),
        "keep_ratio": args.keep_ratio, "repeats": args.repeats, "warmup": args.warmup,
        "variants": [asdict(v) for v in chosen],
    }  # fmt: skip
    host = _host()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(HERE / "latency_engines.py"), file.name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise SystemExit(f"{model}, {threads} threads: the measuring process failed ({done.returncode}): {last[:300]}")
    record = {**{k: request[k] for k in ("model", "size", "threads", "cores", "keep_ratio")}, "host": host,
              "date": time.strftime("%Y-%m-%d %H:%M"), "facts": facts, **json.loads(lines[0][7:])}  # fmt: skip
    if not any(result.get("samples") for result in record["results"].values()):
        raise SystemExit(f"{model}, {threads} threads: no round began and ended with {cores} cores; try again or --cores any")
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"{model}_{threads}" + f"_{cores}" * (cores != "any")
    (args.results / f"{name}.json").write_text(json.dumps(record))
    return record


def _host() -> dict[str, Any]:
    from edge_ibtm.probe import facts

    packages = ("torch", "timm", "executorch", "onnxruntime", "openvino", "ai-edge-litert")
    return {
        "cpu": facts.cpu_model(), "cores": facts.usable_cores(), "load": facts.load_average(),
        "versions": {p: facts.version_of(p) for p in packages},
    }  # fmt: skip


def main() -> None:
    """Prepare, time, report."""
    args = parser().parse_args()
    if args.one:
        return make_one(args.one)
    if args.cores != "any" and round_trip_ns() is None:
        parser().error(f"--cores {args.cores}: nothing tells here how far apart two cores are (latency_cores.py); use any")
    if not args.table:
        made = {model: prepare(args, model) for model in args.models}
        for threads in () if args.prepare else args.threads:
            for model in args.models:
                results = run(args, model, threads, made[model])["results"]
                for name in results:
                    found = ratio(results, name, "plain export")
                    text = f"{found[0]:.3f} of plain [{found[1]:.3f}, {found[2]:.3f}]" if found else "failed"
                    print(f"{model}, {threads} threads: {name}: {text}", flush=True)
    if not args.prepare:
        write_tables(args.results, args.to)
        print(f"wrote {args.to}")


if __name__ == "__main__":
    main()

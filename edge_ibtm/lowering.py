"""Lowering in processes of its own: two at a time where memory allows, and a native crash becomes a message.

`python -m edge_ibtm.lowering JOB.json` carries out one job and prints one JSON line. The worker ends by itself when its
parent is gone, so an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.orphans import end_with_parent

MEMORY_PER_JOB = 4 * 2**30


@dataclass(frozen=True)
class LowerJob:
    """One artifact to make: from weights of a model spec, or from a converted graph (.pt2). options: what `lower` takes,
    calibration images as the name of their file."""

    source: str
    output: str
    target: str
    spec: dict[str, Any]
    options: dict[str, Any]


@dataclass
class Workers:
    """The running worker processes of one pipeline, so that they can be stopped together."""

    running: set[Any]
    stopped: bool = False

    def stop(self) -> None:
        """End every worker."""
        self.stopped = True
        for process in list(self.running):
            process.kill()


def parallel_jobs(wanted: int | None, jobs: int) -> int:
    """How many lowerings run at a time: by request, or by cores and free memory."""
    if wanted:
        return min(wanted, max(1, jobs))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, jobs, _free_memory() // MEMORY_PER_JOB))


def _free_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            values = dict(line.split(":", 1) for line in lines)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 2 * MEMORY_PER_JOB


def run_job(job: LowerJob, workers: Workers) -> dict[str, Any]:
    """Carry out a job in a child process; returns the artifact's figures.

    Errors: what the child raised (UsageError, EdgeIBTMError), or EdgeIBTMError when it died.
    """
    request = Path(job.output).with_name("job.json")
    request.write_text(json.dumps(asdict(job)), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment["PYTHONPATH"] = os.pathsep.join(
        p for p in (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")) if p
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_ibtm.lowering", str(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    workers.running.add(process)
    try:
        out, err = process.communicate()
    finally:
        process.kill()
        workers.running.discard(process)
    request.unlink(missing_ok=True)
    return _answer(job, process.returncode, out, err, workers)


def _answer(job: LowerJob, code: int, out: str, err: str, workers: Workers) -> dict[str, Any]:
    lines = out.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except ValueError:
        answer = {}
    if "artifact" in answer:
        return dict(answer["artifact"])
    if workers.stopped:
        raise EdgeIBTMError(f"lowering {Path(job.output).name} was stopped")
    if "error" in answer:
        raise (UsageError if answer.get("usage") else EdgeIBTMError)(answer["error"])
    if os.environ.get("EDGE_IBTM_DEBUG"):
        sys.stderr.write(err)
    last = (err.strip().splitlines() or ["it said nothing"])[-1][:300]
    how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with exit code {code}"
    raise EdgeIBTMError(f"lowering {Path(job.output).name} {how}: {last}")


def carry_out(job: LowerJob) -> dict[str, Any]:
    """Do one job in this process."""
    import torch

    from edge_ibtm.checkpoint import ModelSpec, build
    from edge_ibtm.stages import load_converted
    from edge_ibtm.targets import lower

    torch.set_num_threads(1)
    start = time.monotonic()
    spec = ModelSpec.from_json(job.spec)
    source = Path(job.source)
    model = load_converted(source) if source.suffix == ".pt2" else build(spec, source)
    example = torch.rand(1, 3, spec.img_size, spec.img_size, generator=torch.Generator().manual_seed(0))
    options = dict(job.options)
    if "calibration" in options:
        options["calibration"] = torch.load(options["calibration"], weights_only=True)
    artifact = lower(model, example, job.output, target=job.target, **options)
    figures = asdict(artifact)
    figures["path"] = Path(job.output).name
    return {**figures, "lowering_seconds": time.monotonic() - start}


def _first_cause(err: BaseException) -> str:
    """`Kind: first line` of the exception at the bottom of the chain."""
    while err.__cause__ or err.__context__:
        err = err.__cause__ or err.__context__ or err
    return f"{type(err).__name__}: {(str(err).strip().splitlines() or ['no message'])[0][:300]}"


def main(request: str) -> int:
    """Worker entry: one job file in, one JSON line out."""
    end_with_parent()
    answer: dict[str, Any]
    try:
        job = LowerJob(**json.loads(Path(request).read_text(encoding="utf-8")))
        stdout = os.dup(1)
        os.dup2(2, 1)  # libraries that print must not mix with the answer
        try:
            answer = {"artifact": carry_out(job)}
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
    except EdgeIBTMError as err:
        answer = {"error": str(err), "usage": isinstance(err, UsageError)}
    except OSError as err:
        answer = {"error": f"cannot write {err.filename or request}: {err.strerror or err}"}
    except KeyboardInterrupt:
        return 130
    except Exception as err:  # a backend's own; its first cause is what tells
        answer = {"error": f"{Path(request).parent.name}: the backend failed ({_first_cause(err)})"}
        if os.environ.get("EDGE_IBTM_DEBUG"):
            raise
    print(json.dumps(answer, default=str))
    return 0 if "artifact" in answer else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

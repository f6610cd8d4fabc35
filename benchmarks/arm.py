"""Merged against unmerged, fp32 and int8, on an emulated Arm CPU: parity, and instructions of one inference.

    python benchmarks/arm.py                    # both models; then docs/ARM.md is written again
    python benchmarks/arm.py --model mobilevit_s --keep-ratio 0.5
    python benchmarks/arm.py --report           # only docs/ARM.md, from what is there

Writes benchmarks/results/arm_<model>.json (emulated results of the probe schema). Each artifact is written down
as soon as it is measured, in arm_<model>.part.json: the same command goes on there after an interruption, unless
code under edge_ibtm or apps/runner changed meanwhile. Weights are random, which changes no count; images are crops of
scikit-learn's two photographs. A model costs about 10 minutes of CPU, nearly all of it lowering.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arm_report
import torch

import edge_ibtm
from edge_ibtm.probe.emulated import verify_aarch64
from edge_ibtm.probe.facts import cpu_model
from edge_ibtm.probe.schema import Emulated, ProbeRun, read_results

ROOT = Path(__file__).parents[1]
MODELS = ("mobilevit_s", "efficientvit_b1")


@dataclass(frozen=True)
class Request:
    """One model, merged with `merger` at `keep_ratio`; img_size None: the model's own."""

    model: str
    keep_ratio: float
    merger: str
    img_size: int | None

    def labels(self) -> list[str]:
        """The four artifacts in the order they are made."""
        stems = [self.model, f"{self.model}-{self.merger}-{self.keep_ratio:g}"]
        return [f"{stem}-{precision}" for stem in stems for precision in ("fp32", "int8")]


def photographs(size: int, config: dict[str, Any]) -> torch.Tensor:
    """Crops of scikit-learn's two photographs as the model wants them, [4, 3, size, size]."""
    from sklearn.datasets import load_sample_images

    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    crops = []
    for photo in load_sample_images().images:
        whole = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255
        for left in (0, 250):
            crop = whole[..., 40 : 40 + 380, left : left + 380]
            crops.append(torch.nn.functional.interpolate(crop, size=size, mode="bilinear", antialias=True))
    return (torch.cat(crops) - mean) / std


def measure(request: Request, done: set[str], folder: Path) -> Iterator[Emulated]:
    """The artifacts that are not `done`, each lowered, run on emulated Arm and compared with x86 and eager."""
    labels = request.labels()
    for ratio, (fp32, int8) in ((1.0, labels[:2]), (request.keep_ratio, labels[2:])):
        if {fp32, int8} <= done:
            continue
        torch.manual_seed(0)
        model = edge_ibtm.build_model(request.model, img_size=request.img_size)
        if ratio < 1:
            edge_ibtm.insert_mergers(model, merger=request.merger, keep_ratio=ratio)
        images = photographs(request.img_size or model.pretrained_cfg["input_size"][-1], model.pretrained_cfg)
        with torch.no_grad():
            expected = model(images[:1])
        for label in [label for label in (fp32, int8) if label not in done]:
            module = model if label == fp32 else edge_ibtm.quantize(model, list(images.split(1)))
            artifact = edge_ibtm.lower(module, images[:1], folder / f"{label}.pte")
            result = verify_aarch64(artifact.path, [images[:1]], [expected])
            how = f"random weights, seed 0; a photograph at {images.shape[-1]} px; emulated on {cpu_model()}"
            how += f"; calibrated with {len(images)} photographs" if label == int8 else ""
            yield result.model_copy(update={"file": None, "notes": (*result.notes, how)})


def run(request: Request, out: Path) -> None:
    """Measure what `out`'s part file does not hold yet, then write `out`."""
    part = out.with_suffix(f".{code_stamp(request)}.part.json")
    held = list(read_results(part).results) if part.is_file() else []
    for stale in set(out.parent.glob(f"{out.stem}.*.part.json")) - {part}:
        stale.unlink()
    with tempfile.TemporaryDirectory() as folder:
        for result in measure(request, {each.model for each in held}, Path(folder)):
            print(arm_report.row(result), flush=True)
            held.append(result)
            _write(part, held)
    _write(out, sorted(held, key=lambda each: request.labels().index(each.model)))
    part.unlink()


def code_stamp(request: Request) -> str:
    """A hash of the request and of the code that decides what is measured."""
    files = [*ROOT.glob("edge_ibtm/**/*.py"), *ROOT.glob("apps/runner/*")]
    digest = hashlib.sha256(f"{platform.machine()} {request}".encode())
    for file in sorted(file for file in files if file.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _write(path: Path, results: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(ProbeRun(results=tuple(results)).model_dump_json(indent=1) + "\n")
    temporary.replace(path)


def main() -> None:
    """Measure, write the results and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help=f"default: {' and '.join(MODELS)}")
    parser.add_argument("--keep-ratio", type=float, default=0.7)
    parser.add_argument("--merger", default="ibtm")
    parser.add_argument("--img-size", type=int, help="default: the model's own")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "ARM.md", help="table to write")
    parser.add_argument("--report", action="store_true", help="only write the table")
    args = parser.parse_args()
    for name in [] if args.report else args.model or MODELS:
        run(Request(name, args.keep_ratio, args.merger, args.img_size), args.results / f"arm_{name}.json")
    args.docs.write_text(arm_report.page(args.results))
    print(f"wrote {args.docs}")


if __name__ == "__main__":
    main()

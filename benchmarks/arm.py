"""Merged against unmerged, fp32 and int8, on an emulated Arm CPU: parity, and instructions of one inference.

    python benchmarks/arm.py --model mobilevit_s --keep-ratio 0.7

Writes benchmarks/results/arm_<model>.json (emulated results of the probe schema) and prints a table.
Instructions are a cost proxy: they repeat to 1e-4, but caches, memory and pipelines are not in them. Weights
are random, which changes no count; inputs are seeded noise. mobilevit_s costs about 8 minutes of CPU, nearly
all of it lowering.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import edge_ibtm
from edge_ibtm.probe.emulated import verify_aarch64
from edge_ibtm.probe.schema import Emulated, ProbeRun

RESULTS = Path(__file__).parent / "results"


def measure(name: str, keep_ratio: float, merger: str, img_size: int | None, folder: Path) -> list[Emulated]:
    """The four artifacts of one model, each lowered, run on emulated Arm and compared with eager."""
    found = []
    for ratio in (1.0, keep_ratio):
        torch.manual_seed(0)
        model = edge_ibtm.build_model(name, img_size=img_size)
        if ratio < 1:
            edge_ibtm.insert_mergers(model, merger=merger, keep_ratio=ratio)
        size = img_size or model.pretrained_cfg["input_size"][-1]
        images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
        quantized = edge_ibtm.quantize(model, list(images.split(1)))
        for precision, module in (("fp32", model), ("int8", quantized)):
            label = f"{name}-{merger}-{ratio:g}-{precision}" if ratio < 1 else f"{name}-{precision}"
            artifact = edge_ibtm.lower(module, images[:1], folder / f"{label}.pte")
            with torch.no_grad():
                expected = model(images[:1])
            result = verify_aarch64(artifact.path, [images[:1]], [expected])
            print(line(result), flush=True)
            found.append(result.model_copy(update={"file": None}))
    return found


def line(result: Emulated) -> str:
    """One row of the table."""
    parity = result.parity
    assert parity is not None and result.instructions is not None
    same = "identical to x86" if parity.identical else f"max abs difference to x86 {parity.max_abs:.2g}"
    return (
        f"{result.model:<36} {result.instructions / 1e6:>9.1f} M instructions  {same}, {'ok' if parity.ok else 'WRONG'}"
    )


def main() -> None:
    """Measure, write, and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mobilevit_s")
    parser.add_argument("--keep-ratio", type=float, default=0.7)
    parser.add_argument("--merger", default="ibtm")
    parser.add_argument("--img-size", type=int, help="default: the model's own")
    parser.add_argument("--out", type=Path, help="results file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.model, args.keep_ratio, args.merger, args.img_size, Path(folder))
    out = args.out or RESULTS / f"arm_{args.model}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(ProbeRun(results=tuple(found)).model_dump_json(indent=1) + "\n")
    counts = [result.instructions or 0 for result in found]
    for name, merged, base in (("fp32", 2, 0), ("int8", 3, 1)):
        print(f"merged / unmerged, {name}: {counts[merged] / counts[base]:.3f} instructions")
    print(f"int8 / fp32: unmerged {counts[1] / counts[0]:.3f}, merged {counts[3] / counts[2]:.3f} instructions")


if __name__ == "__main__":
    main()

"""Rounding learned (QAT) against rounding afterwards, from the same weights with the same further training.

    python benchmarks/int8_qat.py                   # three seeds; results under benchmarks/results/int8_qat
    python benchmarks/int8_qat.py --seeds 0 --images 500

mobilevit_xxs merged with IBTM (keep ratio 0.7) on CIFAR-10 at 128 px, as in int8.py. Each seed takes its own images to
train on: the float model goes on for one epoch and is rounded, all layers or with the worst left in float; a copy of the
start goes on for one epoch with rounding in the graph, all layers in 8 bits. Graphs are run in eager; `int8.py --report`
puts the table into docs/INT8.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

RESULTS = HERE / "results" / "int8_qat"
ROWS = {
    "start": "float, where all begin", "trained": "float, trained on", "int8": "trained on, int8", "mixed": "trained on, mixed",
    "qat": "qat",
}  # fmt: skip
MODEL, MERGER, BATCH, LR = "mobilevit_xxs", "ibtm", 32, 1e-4


def measure(seed: int, images: int, test_images: int) -> dict[str, Any]:
    """Top-1 in % of the five ways, from one seed's images."""
    from int8 import calibration_of, trained

    import edge_ibtm
    from edge_ibtm.finetune import FinetuneConfig
    from edge_ibtm.quantize_qat import quantize_qat

    start, train, test = trained(MODEL, MERGER)
    config = FinetuneConfig(epochs=1, lr=LR, batch_size=BATCH, seed=seed)
    part = train.first(images, skip=2000 + seed * images)
    calibration, test = calibration_of(train), test.first(test_images)

    def top1(model: Any) -> float:
        import torch

        with torch.no_grad():
            hits = [int(model(test.view(test.images[i : i + 1])).argmax(1) == test.labels[i]) for i in range(len(test))]
        return round(100 * sum(hits) / len(hits), 2)

    def go_on(model: Any) -> Any:
        edge_ibtm.finetune(model, part, None, config)
        return model.eval()

    found = {"start": top1(start)}
    further = go_on(copy.deepcopy(start))
    found["trained"] = top1(further)
    for scheme in ("int8", "mixed"):
        found[scheme] = top1(edge_ibtm.quantize(further, calibration, scheme=scheme))
    found["qat"] = top1(quantize_qat(start, calibration, go_on, batch_size=BATCH))
    return {"seed": seed, "images": images, "test_images": test_images, "top1": found}


def table() -> list[str]:
    """Lines of Markdown from the results; none without them."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    if not records:
        return []
    first, seeds = records[0], len(records)
    lines = [
        f"## Trained with rounding (qat): {MODEL} merged with {MERGER}", "",
        f"`python benchmarks/int8_qat.py`: {seeds} seeds, each with {first['images']} training images of its own for one",
        f"epoch (lr {LR:g}, batches of {BATCH}); top-1 on {first['test_images']} test images in eager;",
        f"{first['host']}, {first['date']}.", "",
        "| what | top-1, %: mean | standard deviation | seeds |", "|---|--:|--:|---|",
    ]  # fmt: skip
    for key, name in ROWS.items():
        values = [r["top1"][key] for r in records]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {statistics.mean(values):.2f} | {spread} | {', '.join(f'{v:.1f}' for v in values)} |")
    return [*lines, ""]


def main() -> None:
    """Measure the seeds that are missing."""
    from int8 import keep

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--images", type=int, default=2000)
    p.add_argument("--test-images", type=int, default=1000)
    args = p.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in map(int, args.seeds.split(",")):
        path = RESULTS / f"{MODEL}_{MERGER}_{seed}.json"
        if path.is_file():
            continue
        keep(path, measure(seed, args.images, args.test_images))
    print("\n".join(table()))


if __name__ == "__main__":
    main()

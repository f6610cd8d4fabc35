"""Where to merge: top-1 against MACs of every place a family can merge at, without fine-tuning, on CIFAR-10 at 128 px.

    python benchmarks/placement.py --model mobilevit_xxs --weights FILE    # -> results/placement/mobilevit_xxs.json

Rows that are there are not measured again. IBTM's mask buffers are filled from 500 training images.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from accuracy_cells import mcnemar, pack, unpack  # noqa: E402
from accuracy_data import asset, load_set  # noqa: E402

import edge_ibtm  # noqa: E402
from edge_ibtm.backbones import family_of  # noqa: E402
from edge_ibtm.statistics_sites import refresh_mask_buffers  # noqa: E402

SIDE, CLASSES = 128, 10
RESULTS = Path(__file__).parent / "results" / "placement"


def places(model: torch.nn.Module) -> list[str]:
    """Densities of the model's family; with "progressive" also all of it at once, in the first layer of each block."""
    densities = family_of(model).densities
    return [*densities, *(["at once"] if "progressive" in densities else [])]


def merged(name: str, weights: Path, merger: str, place: str, ratio: float) -> torch.nn.Module:
    """A model merged at one place; "base" for none."""
    model = edge_ibtm.build_model(name, num_classes=CLASSES, weights=weights)
    if place == "base":
        return model
    density, ratios = ("progressive", [ratio, 1.0] * 3) if place == "at once" else (place, ratio)
    edge_ibtm.insert_mergers(model, merger=merger, keep_ratio=ratios, density=density)
    if merger == "ibtm":
        train = load_set("cifar10", SIDE, train=True).first(500)
        refresh_mask_buffers(model, [(train.view(train.images), train.labels)])
    return model.eval()


@torch.no_grad()
def correct(model: torch.nn.Module, images: int) -> torch.Tensor:
    """Which of the first test images [n] the model gets right."""
    data = load_set("cifar10", SIDE, train=False).first(images)
    found = [model(data.view(part)).argmax(1) for part in data.images.split(50)]
    return torch.cat(found) == data.labels


def measure(args: argparse.Namespace, merger: str, place: str, ratio: float, base: dict[str, Any]) -> dict[str, Any]:
    """One row; lost and gained count images against the unmerged model (McNemar's p)."""
    model = merged(args.model, args.weights, merger, place, ratio)
    right = correct(model, args.images)
    row = {"merger": merger, "place": place, "keep_ratio": ratio, "macs": edge_ibtm.count_macs(model, SIDE),
           "top1": round(100 * float(right.float().mean()), 2), "images": args.images}  # fmt: skip
    if not base:
        return {**row, "correct": pack(right)}
    lost, gained, p = mcnemar(unpack(base["correct"]), right)
    return {**row, "macs_share": round(row["macs"] / base["macs"], 4), "lost": lost, "gained": gained, "p": float(f"{p:.2g}")}


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilevit_xxs")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--ratios", type=lambda text: [float(v) for v in text.split(",")], default=[0.7, 0.5, 0.3])
    args = parser.parse_args()
    args.weights = args.weights or asset(f"{args.model}_cifar10_{SIDE}.safetensors")
    path = RESULTS / f"{args.model}.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    wanted = [("identity", "base", 1.0)]
    for merger in ("tome", "ibtm"):
        wanted += [(merger, place, r) for r in args.ratios for place in places(edge_ibtm.build_model(args.model))]
    for key in wanted:
        row = next((r for r in rows if (r["merger"], r["place"], r["keep_ratio"]) == key), None)
        if row is None:
            row = measure(args, *key, base=rows[0] if rows else {})
            rows.append(row)
            RESULTS.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{key[0]:9} {key[1]:12} {key[2]:4} MACs {row.get('macs_share', 1):.3f} top-1 {row['top1']:.2f} %", flush=True)


if __name__ == "__main__":
    main()

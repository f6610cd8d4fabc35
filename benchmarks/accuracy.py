"""Accuracy of every merging method at equal MACs, a cell at a time, resumable.

    python benchmarks/accuracy.py run --experiment a --minutes 30     # frozen ViT-S/14, merging at test time
    python benchmarks/accuracy.py base --model mobilevit_xxs --images 20000
    python benchmarks/accuracy.py run --experiment b --minutes 30     # fine-tuned MobileViT-XXS and EfficientViT-B0
    python benchmarks/accuracy.py run --experiment b --data /data/imagenet --weights pretrained --models mobilevit_s --side 256
    python benchmarks/accuracy.py list --experiment b
    python benchmarks/accuracy.py step                                 # cost of a training step, merged against base
    python benchmarks/accuracy.py report                               # docs/RESULTS.md from the JSON

Cells are kept under benchmarks/results/accuracy; a cell that is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from edge_ibtm.errors import EdgeIBTMError  # noqa: E402


def _numbers(kind: Any) -> Any:
    return lambda text: tuple(kind(v) for v in text.split(","))


def parser() -> argparse.ArgumentParser:
    """Command line of the benchmark."""
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    for name in ("run", "list"):
        p = commands.add_parser(name)
        p.add_argument("--experiment", choices=("a", "b"), required=True)
        p.add_argument("--only", default="", help="comma-separated texts that a cell's name must contain")
        p.add_argument("--minutes", type=float, default=1e6, help="stop cleanly after so long")
        p.add_argument("--test-images", type=int, default=2000)
        p.add_argument("--images", type=_numbers(int), default=(0, 5000), help="(b) fine-tuning images")
        p.add_argument("--ratios", type=_numbers(float), default=(0.7, 0.5, 0.9, 0.6, 0.8), help="(b) keep ratios")
        p.add_argument("--seeds", type=_numbers(int), default=(0, 1, 2), help="(b)")
        p.add_argument("--models", type=_numbers(str), default=("mobilevit_xxs", "efficientvit_b0"), help="(b)")
        p.add_argument("--no-ablations", action="store_true", help="(b)")
        p.add_argument("--data", help="(b) images instead of CIFAR-10: anything timm's create_dataset takes")
        p.add_argument("--side", type=int, default=128, help="(b) pixels")
        p.add_argument("--weights", help="(b) base weights: pretrained, or a file")
        p.add_argument("--batch", type=int, default=50, help="(b) images a training step")
    base = commands.add_parser("base", help="train a base model of experiment (b) on")
    base.add_argument("--model", required=True)
    base.add_argument("--images", type=int, default=20_000)
    base.add_argument("--epochs", type=int, default=1)
    base.add_argument("--minutes", type=float, default=1e6)
    step = commands.add_parser("step", help="cost of a training step of the merged model against the base's")
    step.add_argument("--model", default="mobilevit_s")
    step.add_argument("--keep-ratio", type=float, default=0.7)
    step.add_argument("--batch", type=int, default=8)
    step.add_argument("--rounds", type=int, default=20)
    report = commands.add_parser("report", help="write docs/RESULTS.md from the kept cells")
    report.add_argument("--to", type=Path, default=Path(__file__).parent.parent / "docs" / "RESULTS.md")
    return main


def wanted(args: argparse.Namespace) -> list[Any]:
    """Cells that the arguments ask for, in order."""
    if args.experiment == "a":
        import accuracy_frozen as experiment

        cells = experiment.cells()
    else:
        from accuracy_tuned import Grid
        from accuracy_tuned import cells as tuned

        cells = tuned(Grid(setup_of(args), args.models, args.ratios, args.images, args.seeds, not args.no_ablations))
    needed = [text for text in args.only.split(",") if text]
    return [c for c in cells if all(text in c.name + "-" for text in needed)]


def setup_of(args: argparse.Namespace) -> Any:
    """Images and weights of experiment (b)."""
    from accuracy_tuned import Setup

    return Setup(args.data, args.side, args.weights, args.batch)


def run(args: argparse.Namespace) -> int:
    """Run missing cells until the time is up. Returns how many are still missing."""
    import accuracy_frozen
    import accuracy_tuned

    deadline, longest = time.monotonic() + 60 * args.minutes, 0.0
    cells = wanted(args)
    missing = [c for c in cells if not c.path.is_file()]
    for i, cell in enumerate(missing):
        spare = longest if args.experiment == "a" else 0.0
        if time.monotonic() + spare > deadline:
            break
        began = time.monotonic()
        print(f"[{len(cells) - len(missing) + i + 1}/{len(cells)}] {cell.name}", flush=True)
        try:
            if args.experiment == "a":
                accuracy_frozen.run(cell, args.test_images, deadline)
            else:
                accuracy_tuned.run(cell, args.test_images, deadline, setup_of(args))
        except accuracy_tuned.TimeUp:
            print("  time is up; the cell continues next time", flush=True)
            break
        longest = max(longest, time.monotonic() - began)
    left = sum(not c.path.is_file() for c in cells)
    print(f"{len(cells) - left} of {len(cells)} cells done")
    return left


def main() -> int:
    """Entry point; 0, or 2 for a request that cannot be carried out."""
    args = parser().parse_args()
    try:
        if args.command == "run":
            run(args)
        elif args.command == "list":
            for cell in wanted(args):
                print("done   " if cell.path.is_file() else "missing", cell.name)
        elif args.command == "base":
            from accuracy_tuned import TimeUp, train_base

            try:
                print(train_base(args.model, args.images, args.epochs, time.monotonic() + 60 * args.minutes))
            except TimeUp:
                print("time is up; the same command continues")
        elif args.command == "step":
            from accuracy_step import measure

            print(measure(args.model, args.keep_ratio, args.batch, args.rounds))
        else:
            from accuracy_report import write_report

            print(write_report(args.to))
    except EdgeIBTMError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

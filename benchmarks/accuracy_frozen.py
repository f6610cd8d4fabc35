"""Experiment (a): the trained ViT-S/14, frozen; a logistic probe on its unmerged features; merging at test time only.

Three probes, each on another part of the probe images; the random mergers draw once. IBTM's buffers are filled
from 500 of the probe's own training images and labels; nothing is fine-tuned.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accuracy_cells import Cell, fill_buffers, fit_probe, ib_record, insert, mcnemar, pack, pooled, write
from accuracy_data import Upsampled, focus_vit, load_set
from torch import Tensor

from edge_ibtm.macs import count_macs

SIDE, TOKENS = 112, 65
DATA = ("fashion", "cifar10")
METHODS = ("ibtm", "tome", "tofu", "ltmp", "evit", "ats", "uniform", "random", "drop")
ABLATIONS = ("ibtm-hard_only", "ibtm-no_lambda", "ibtm-paper_step", "ibtm-no_step")
# tokens left of 65 and what is run there, in order of worth
PLAN = ((29, METHODS), (6, METHODS), (29, ABLATIONS), (46, METHODS), (13, METHODS))
SEEDS, PROBE_IMAGES, SUBSET = 3, 2000, 1500
SEEN = 2000  # first test images, which settings of IBTM were once looked at with
CACHE = Path(__file__).parent.parent / "runs" / "accuracy"


def cells() -> list[Cell]:
    """Every cell; the data sets' unmerged cells come first."""
    made = [Cell("a", data, "vit_s14_focus", SIDE, "identity", density="block") for data in DATA]
    for left, methods in PLAN:
        ratio = round((left - 1) / (TOKENS - 1), 4)
        for data in DATA:
            made += [Cell("a", data, "vit_s14_focus", SIDE, method, ratio, density="block") for method in methods]
    return made


def _cached(name: str, compute: Any) -> Tensor:
    path = CACHE / f"{name}.pt"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(compute(), path)
    return torch.load(path, weights_only=True)


def _probes(data: str) -> list[Any]:
    train = load_set(data, SIDE, train=True).first(PROBE_IMAGES)
    features = _cached(f"a-{data}-train", lambda: pooled(focus_vit(SIDE, 10), train))
    probes = []
    for seed in range(SEEDS):
        part = torch.randperm(PROBE_IMAGES, generator=torch.Generator().manual_seed(seed))[:SUBSET]
        probes.append(fit_probe(features[part], train.labels[part]))
    return probes


def _features(cell: Cell, test: Upsampled) -> tuple[Tensor, int]:
    """Features [n, D] of the test images under the cell's method, and the model's MACs."""
    model = insert(focus_vit(SIDE, 10), cell)
    fill_buffers(model, load_set(cell.data, SIDE, train=True).first(500))
    return pooled(model, test), count_macs(model, SIDE)


def run(cell: Cell, test_images: int, deadline: float) -> None:
    """Compute and keep one cell; quick enough that the deadline is only looked at between cells."""
    began = time.monotonic()
    test = load_set(cell.data, SIDE, train=False).first(test_images, skip=SEEN)
    base = _cached(f"a-{cell.data}-test{test_images}", lambda: pooled(focus_vit(SIDE, 10), test))
    features, macs = base, count_macs(focus_vit(SIDE, 10), SIDE)
    if cell.method != "identity":
        features, macs = _features(cell, test)
    runs = []
    for seed, probe in enumerate(_probes(cell.data)):
        correct, before = (probe(f) == test.labels for f in (features, base))
        lost, gained, p = mcnemar(before, correct)
        top1 = 100 * float(correct.double().mean())
        runs.append({"seed": seed, "top1": top1, "lost": lost, "gained": gained, "p": p, "correct": pack(correct)})
    left = 1 + round(cell.keep_ratio * (TOKENS - 1))
    result = {"tokens": TOKENS, "left": left, "macs": macs, "test_images": test_images, "runs": runs,
              "ib": ib_record(features, test)}  # fmt: skip
    write(cell, result, time.monotonic() - began)

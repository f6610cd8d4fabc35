"""Cost of a training step of a merged model against its base's: both in one process, steps interleaved."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

import torch
from accuracy_cells import RESULTS
from torch import nn
from torch.nn import functional as F

import edge_ibtm
from edge_ibtm.statistics_sites import refresh_mask_buffers


def _stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    model.train().to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> float:
        began = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def measure(name: str, keep_ratio: float, batch: int, rounds: int) -> str:
    """Run `rounds` interleaved steps after 3 to warm up; keep and return the medians and their ratio."""
    side = 256 if name.startswith("mobilevit") else 224
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 1000, (batch,))
    base, merged = (edge_ibtm.build_model(name) for _ in range(2))
    edge_ibtm.insert_mergers(merged, merger="ibtm", keep_ratio=keep_ratio)
    refresh_mask_buffers(merged, [(images, labels)])
    steps = [_stepper(m, images, labels) for m in (base, merged)]
    times: list[list[float]] = [[], []]
    for i in range(rounds + 3):
        for j in ((0, 1), (1, 0))[i % 2]:
            seconds = steps[j]()
            if i >= 3:
                times[j].append(seconds)
    median = [sorted(t)[len(t) // 2] for t in times]
    record = {
        "model": name, "keep_ratio": keep_ratio, "side": side, "batch": batch, "rounds": rounds,
        "base_ms": round(1000 * median[0], 1), "merged_ms": round(1000 * median[1], 1),
        "ratio": round(median[1] / median[0], 4), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "load_at_end": round(os.getloadavg()[0], 2), "torch": torch.__version__,
    }  # fmt: skip
    folder = RESULTS.parent / "training_step"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-r{keep_ratio:g}.json").write_text(json.dumps(record, indent=1) + "\n")
    return json.dumps(record)

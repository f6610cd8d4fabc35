"""Cells of the accuracy benchmark: what is run, how a result is kept, and the statistics of paired comparisons."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edge_ibtm
from edge_ibtm.mergers.controls import RandomDrop, RandomMerge
from edge_ibtm.mergers.ibtm import IBTM
from edge_ibtm.statistics_sites import refresh_mask_buffers

RESULTS = Path(os.environ.get("EDGE_IBTM_RESULTS", Path(__file__).parent / "results" / "accuracy"))


@dataclass(frozen=True)
class Cell:
    """One result to get. images: fine-tuning images; seed: of the data order, the probe's subset, or random merging."""

    experiment: str
    data: str
    model: str
    side: int
    method: str
    keep_ratio: float = 1.0
    images: int = 0
    seed: int = 0
    density: str = "auto"

    @property
    def name(self) -> str:
        """File name without suffix."""
        return (
            f"{self.experiment}-{self.data}-{self.model}-{self.side}px-{self.density}-{self.method}"
            f"-r{self.keep_ratio:.3g}-n{self.images}-s{self.seed}"
        )

    @property
    def path(self) -> Path:
        """Where its result is kept."""
        return RESULTS / f"{self.name}.json"


def _no_penalty(m: IBTM) -> None:
    if m.log_lambda is not None:
        m.log_lambda.data.fill_(-30.0)
        m.log_lambda.requires_grad_(False)


def _free_pairs(m: IBTM) -> None:
    fresh = IBTM(1)
    m.log_lambda, m.threshold = fresh.log_lambda, fresh.threshold


def _even_runs(m: IBTM) -> None:
    m.log_lambda = m.threshold = None


def _fixed_eta(m: IBTM) -> None:
    m.information.log_eta.requires_grad_(False)


def _no_step(m: IBTM) -> None:
    m.information.log_eta.data.fill_(-30.0)
    m.information.log_eta.requires_grad_(False)


# ablations of IBTM: what is changed on each of its mask modules after surgery
VARIANTS: dict[str, Callable[[IBTM], Any]] = {
    "ibtm": lambda m: None,
    "ibtm-hard_only": lambda m: setattr(m, "soft_weights", False),
    "ibtm-no_lambda": _no_penalty,
    "ibtm-paper_step": lambda m: setattr(m.information, "conditional", False),
    "ibtm-free_pairs": _free_pairs,
    "ibtm-even_runs": _even_runs,
    "ibtm-fixed_eta": _fixed_eta,
    "ibtm-no_step": _no_step,
}
# what IBTM is trained with besides cross-entropy, and ablations of it: fields of FinetuneConfig
RECIPE: dict[str, Any] = {"lambda_ib": 0.3, "ib_start": 0.0, "ib_conditional": False, "distill": 1.0}
TRAINING: dict[str, dict[str, Any]] = {
    "ibtm-plain": {"lambda_ib": 0.0, "distill": 0.0},
    "ibtm-no_ib_loss": {"lambda_ib": 0.0},
    "ibtm-strong_ib_loss": {"lambda_ib": 1.0},
    "ibtm-no_distill": {"distill": 0.0},
    "ibtm-conditional_loss": {"ib_conditional": True},
    "ibtm-half_clusters": {"ib_clusters": 5},
    "tome-distilled": {"distill": 1.0},
    "uniform-distilled": {"distill": 1.0},
}


def insert(model: nn.Module, cell: Cell) -> nn.Module:
    """Put the cell's method into a model; `identity` and `lower_resolution` leave it as it is."""
    method = cell.method
    merger = method.split("-")[0]
    if merger in ("identity", "lower_resolution"):
        return model
    edge_ibtm.insert_mergers(model, merger=merger, keep_ratio=cell.keep_ratio, density=cell.density)
    for module in model.modules():
        if isinstance(module, IBTM) and method in VARIANTS:
            VARIANTS[method](module)
        if isinstance(module, (RandomMerge, RandomDrop)):
            module.seed = cell.seed
    return model


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """(lost, gained, p) of `second` against `first`, correct [n] bools: exact two-sided McNemar test."""
    lost = int((first & ~second).sum())
    gained = int((~first & second).sum())
    n, k = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return lost, gained, min(1.0, 2 * tail)


def pack(correct: Tensor) -> str:
    """Bools [n] as hexadecimal digits, most significant bit first."""
    bits = "".join("1" if c else "0" for c in correct.tolist())
    return f"{int('1' + bits, 2):x}"


def unpack(text: str) -> Tensor:
    """The inverse of `pack`."""
    return torch.tensor([c == "1" for c in f"{int(text, 16):b}"[1:]])


def fit_probe(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Logistic regression on standardised features [n, D]; returns features -> predicted class."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    probe.fit(features.numpy(), labels.numpy())
    return lambda x: torch.from_numpy(probe.predict(x.numpy()))


def fill_buffers(model: nn.Module, images: Any) -> None:
    """Fill IBTM's mask buffers from labelled images (accuracy_data.Upsampled); other methods have none."""
    batches = zip(images.images.split(50), images.labels.split(50))
    refresh_mask_buffers(model, ((images.view(part), labels) for part, labels in batches))


@torch.no_grad()
def pooled(model: nn.Module, data: Any, batch: int = 50) -> Tensor:
    """Pooled last features [n, D] of a data set of accuracy_data.Upsampled."""
    parts = []
    for start in range(0, len(data), batch):
        images = data.view(data.images[start : start + batch])
        parts.append(model.forward_head(model.forward_features(images), pre_logits=True))  # type: ignore[operator]
    return torch.cat(parts)


def write(cell: Cell, result: dict[str, Any], seconds: float) -> None:
    """Keep a result with the facts of its host."""
    record = {
        **asdict(cell),
        **result,
        "seconds": round(seconds, 1),
        "host": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    part = cell.path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, cell.path)


def read_all() -> Iterator[dict[str, Any]]:
    """Every result there is."""
    for path in sorted(RESULTS.glob("*.json")):
        yield json.loads(path.read_text())


def ib_record(features: Tensor, data: Any, classes: int = 10) -> dict[str, float]:
    """IB of pooled features [n, D] against the images and labels of `data`, rounded."""
    from edge_ibtm.ib import input_features, measure_ib

    inputs = input_features(torch.cat([data.view(p) for p in data.images.split(200)]))
    return rounded(measure_ib(F.normalize(features, dim=-1), inputs, data.labels, classes))


def rounded(measure: Any) -> dict[str, Any]:
    """An IBMeasure as a dict with four decimals."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(measure).items()}

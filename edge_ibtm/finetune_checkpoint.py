"""Checkpoints that survive kill -9, and the metrics file beside them.

One file, `checkpoint.pt`, written to a temporary name and renamed; tensors and plain values only, so that it loads with
weights_only. Data order and augmentation are functions of (seed, epoch, step) (finetune_data.py), so a checkpoint needs
no random state.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.files import replacing, save_tensors, write_text

if TYPE_CHECKING:
    from edge_ibtm.finetune_loop import Run

NAME, METRICS = "checkpoint.pt", "metrics.jsonl"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` atomically to folder/checkpoint.pt. Errors: EdgeIBTMError when the disk refuses."""
    target = folder / NAME
    try:
        with replacing(target) as part, part.open("wb") as file:
            save_tensors(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as err:
        raise EdgeIBTMError(f"checkpoint {target} cannot be written ({err}); free space or choose a folder") from err


def load_checkpoint(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The checkpoint in `folder`, or None when there is none.

    Errors: UsageError when it belongs to another configuration or cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises many kinds for a file that is not a checkpoint
        raise UsageError(f"{path} is no checkpoint of edge_ibtm ({err}); remove it to start over") from err
    if state.get("fingerprint") != fingerprint:
        raise UsageError(
            f"{path} was written with other settings or for another model "
            f"({state.get('fingerprint')} instead of {fingerprint}); remove it, or choose another folder"
        )
    return state


def state_of(run: Run) -> dict[str, Any]:
    """Everything that a run needs to continue."""
    scaler = run.accelerator.scaler
    return {
        "fingerprint": run.fingerprint,
        "model": run.raw.state_dict(),
        "optimizer": run.bare_optimizer.state_dict(),
        "ema": run.ema.module.state_dict() if run.ema is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "clusters": asdict(run.clusters) if run.clusters is not None else None,
        "progress": {"epoch": run.epoch, "step": run.step, "bad": run.bad, "sums": run.sums},
        "history": asdict(run.history),
    }


def restore(run: Run, state: dict[str, Any]) -> None:
    """Put a run, whose model has the sites it had then, where `state_of` found it."""
    from edge_ibtm.finetune import EpochMetrics, History
    from edge_ibtm.statistics import Clusters

    run.raw.load_state_dict(state["model"])
    run.bare_optimizer.load_state_dict(state["optimizer"])
    if run.ema is not None:
        run.ema.module.load_state_dict(state["ema"])
    if run.accelerator.scaler is not None and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    if state["clusters"]:
        device = run.accelerator.device
        parts: dict[str, Any] = {k: v.to(device) if torch.is_tensor(v) else v for k, v in state["clusters"].items()}
        run.clusters = Clusters(**parts)
    place, past = state["progress"], state["history"]
    run.epoch, run.step, run.bad, run.sums = (place[k] for k in ("epoch", "step", "bad", "sums"))
    run.history = History(**{**past, "epochs": [EpochMetrics(**e) for e in past["epochs"]]})
    run.history.resumed_at = run.history.steps


class MetricsLog:
    """JSON lines in folder/metrics.jsonl (and TensorBoard events in folder/tensorboard when asked for)."""

    def __init__(self, folder: Path | None, first_step: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / METRICS if folder else None
        self.board: Any = None
        if folder is None or self.path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(f"{line}\n" for line in self._lines(first_step)))
        if tensorboard:
            self.board = _summary_writer(folder / "tensorboard", first_step)

    def _lines(self, last: int) -> list[str]:
        """The records up to step `last`; what is none, such as one cut short by a crash, is left out."""
        if self.path is None or not self.path.is_file():
            return []
        return [line for line in self.path.read_text().splitlines() if _step_of(line) <= last]

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one record of plain values at an optimizer step."""
        if self.path is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)
            self.board.flush()

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> float:
    """The step of a record, infinite for what is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise UsageError("tensorboard is not installed; pip install tensorboard, or leave it off") from err
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

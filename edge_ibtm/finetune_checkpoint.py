"""Checkpoints that survive kill -9, and the metrics file beside them.

One file, `checkpoint.pt`, written to a temporary name and renamed; tensors and plain values only, so that it loads with
weights_only. Data order and augmentation are functions of (seed, epoch, step) (finetune_data.py), so a checkpoint needs
no random state.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from edge_ibtm.errors import EdgeIBTMError, UsageError

NAME, METRICS = "checkpoint.pt", "metrics.jsonl"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` atomically to folder/checkpoint.pt. Errors: EdgeIBTMError when the disk refuses."""
    target = folder / NAME
    part = folder / f".{NAME}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except (OSError, RuntimeError) as err:
        part.unlink(missing_ok=True)
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


def remove_checkpoint(folder: Path) -> None:
    """Delete folder/checkpoint.pt if it is there."""
    (folder / NAME).unlink(missing_ok=True)


class MetricsLog:
    """JSON lines in folder/metrics.jsonl (and TensorBoard events in folder/tensorboard when asked for)."""

    def __init__(self, folder: Path | None, first_step: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / METRICS if folder else None
        self.board: Any = None
        if folder is None or self.path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= first_step]
        part = folder / f".{METRICS}"
        part.write_text("".join(line + "\n" for line in kept))
        os.replace(part, self.path)
        if tensorboard:
            self.board = _summary_writer(folder / "tensorboard", first_step)

    def _lines(self) -> list[str]:
        """Complete lines; one cut short by a crash is left out."""
        if self.path is None or not self.path.is_file():
            return []
        return [line for line in self.path.read_text().splitlines() if line.endswith("}")]

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


def _summary_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise UsageError("tensorboard is not installed; pip install tensorboard, or leave it off") from err
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

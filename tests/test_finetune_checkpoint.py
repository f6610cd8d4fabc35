"""Checkpoint files: whole, or the one before."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from edge_ibtm.finetune_checkpoint import load_checkpoint, save_checkpoint


def test_an_interrupt_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    save_checkpoint(tmp_path, {"fingerprint": "x"})
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, {"fingerprint": "y"})
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"] and load_checkpoint(tmp_path, "x")


def test_an_interrupt_within_torchs_writer_is_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.FileIO):
        def write(self, data: object) -> int:
            if self.tell() > 1000:
                raise KeyboardInterrupt
            return super().write(data)  # type: ignore[arg-type]

    save_checkpoint(tmp_path, {"fingerprint": "x"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "open", lambda path, mode: Interrupted(path, mode))
        save_checkpoint(tmp_path, {"fingerprint": "y", "weights": torch.rand(10_000)})
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"] and load_checkpoint(tmp_path, "x")

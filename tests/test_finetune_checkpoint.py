"""Checkpoint files: whole, or the one before."""

from __future__ import annotations

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

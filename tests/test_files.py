"""Files are whole or absent, and readable by whom they should be."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from torch import nn

from edge_ibtm.checkpoint import save_state
from edge_ibtm.errors import UsageError
from edge_ibtm.files import replacing
from edge_ibtm.finetune_checkpoint import save_checkpoint


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model.pte"
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []


def test_what_killed_writers_left_goes_and_what_runs_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, running = (tmp_path / f".{pid}.part.model.pte" for pid in (dead.pid, os.getppid()))
    others = [running, tmp_path / ".mine.part.model.pte", tmp_path / f".{dead.pid}.part.other.pte"]
    for file in (left, *others):
        file.write_bytes(b"half")
    with replacing(tmp_path / "model.pte") as temporary:
        temporary.write_bytes(b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "model.pte"])


def test_weights_are_readable_as_other_files_are(tmp_path: Path) -> None:
    save_state(nn.Linear(2, 2), tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_folder_in_the_place_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(UsageError, match="checkpoint.pt is a folder"):
        save_checkpoint(tmp_path, {})

"""The accuracy benchmark runs on any labelled images: here a folder of coloured noise and random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import edge_ibtm

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("accuracy")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 6)):
        for label, colour in enumerate(("red", "green")):
            place = root / "set" / split / colour
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (64, 64, 3), np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(place / f"{i}.png")
    torch.manual_seed(0)
    save_file(edge_ibtm.build_model("efficientvit_b0", num_classes=2).state_dict(), root / "base.safetensors")
    return root


@pytest.mark.slow
def test_cells_of_a_folder_are_run_kept_and_reported(folder: Path) -> None:
    environment = {**os.environ, "EDGE_IBTM_RESULTS": str(folder / "results"), "OMP_NUM_THREADS": "1"}

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    run = (
        "run", "--experiment", "b", "--data", str(folder / "set"), "--weights", str(folder / "base.safetensors"),
        "--side", "64", "--batch", "8", "--models", "efficientvit_b0", "--images", "24", "--ratios", "0.5",
        "--seeds", "0", "--no-ablations",
    )  # fmt: skip
    for method in ("identity", "ibtm", "tome"):
        assert "1 of 1 cells done" in call(*run, f"--only=-{method}-")
    assert "[" not in call(*run, "--only=-tome-")  # kept, not run again
    cells = {c["method"]: c for p in (folder / "results").glob("*.json") for c in [json.loads(p.read_text())]}
    assert cells["ibtm"]["macs"] < cells["identity"]["macs"] and cells["ibtm"]["test_images"] == 12
    assert all(0 <= c["runs"][0]["top1"] <= 100 for c in cells.values())
    assert "ib_bound" in cells["ibtm"]["train_loss"] and "ib_bound" not in cells["tome"]["train_loss"]
    call("report", "--to", str(folder / "RESULTS.md"))
    text = (folder / "RESULTS.md").read_text()
    assert "points against tome" in text and "| ibtm | 64 |" in text

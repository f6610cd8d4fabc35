"""Two gloo processes under torchrun equal one process with the same global batch.

The model has no batch statistics: BatchNorm sees each process's part of the batch (SyncBatchNorm, which torch has on
GPUs only, would make them equal; see docs/training.md), so with it equality is not a property of the loop.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHILD = """
import atexit, os, sys
sys.path[:0] = [{tests!r}, {root!r}]
from dataclasses import replace
import torch
from accelerate import PartialState
from test_finetune import CPU, coloured, merged_vit, tiny_vit
from edge_ibtm.finetune import finetune
from edge_ibtm.finetune_data import Augmentation
from edge_ibtm.finetune_eval import evaluate
from edge_ibtm.finetune_setup import build_accelerator
from edge_ibtm.statistics import all_sum, fit_clusters
from edge_ibtm.statistics_sites import refresh_mask_buffers
torch.set_num_threads(1)
folder = sys.argv[1]
# registered before the group is made, so it looks after all that is registered then
left = folder + "/left" + os.environ.get("RANK", "0")
atexit.register(lambda: open(left, "w").write(str(torch.distributed.is_initialized())))
config = replace(CPU, epochs=5, batch_size=16, lambda_ib=0.1, ib_start=0.0, augment=Augmentation(crop=2, flip=True),
                 checkpoint_dir=folder + "/run", max_steps=20)
model = tiny_vit()
history = finetune(model, coloured(), coloured(30), config)
accelerator = build_accelerator(config)
rank, world = accelerator.process_index, accelerator.num_processes
images, labels = coloured(64).tensors
merged = merged_vit()
mine = [(images[rank::world], labels[rank::world])]
filled = refresh_mask_buffers(merged, mine, accelerator)
if accelerator.is_main_process:
    torch.save({{"model": model.state_dict(), "buffers": dict(merged.named_buffers()), "filled": filled,
                "steps": history.steps, "top1": history.top1, "world": world}}, folder + "/out.pt")
"""


def run(folder: Path, processes: int) -> dict[str, object]:
    here = Path(__file__).parent
    folder.mkdir()
    script = folder / "child.py"
    script.write_text(CHILD.format(tests=str(here), root=str(here.parent)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command = [sys.executable, *(launch if processes > 1 else []), str(script), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    at_exit = [(folder / f"left{rank}").read_text() for rank in range(processes)]
    return {**torch.load(folder / "out.pt", weights_only=True), "grouped_at_exit": at_exit}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("ddp")
    return run(folder / "one", 1), run(folder / "two", 2)


def test_weights_after_20_steps_are_equal_to_1e_4(runs: tuple[dict, dict]) -> None:
    one, two = runs
    assert (one["world"], two["world"]) == (1, 2) and one["steps"] == two["steps"] == 20
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert one["top1"] == two["top1"]


def test_buffers_of_the_mask_modules_are_equal(runs: tuple[dict, dict]) -> None:
    one, two = runs
    assert one["filled"] == two["filled"] > 0
    names = [n for n in one["buffers"] if n.rsplit(".", 1)[-1] in ("centroids", "likelihood", "prior", "step")]
    assert names and all(one["buffers"][n].abs().sum() > 0 for n in names)
    for name in names:
        torch.testing.assert_close(two["buffers"][name], one["buffers"][name], atol=1e-5, rtol=1e-4)


def test_processes_leave_their_group_before_the_interpreter_ends(runs: tuple[dict, dict]) -> None:
    """Gloo's threads, left running, abort some processes after all their work ("terminate called without ...")."""
    assert runs[1]["grouped_at_exit"] == ["False", "False"]

"""The training loop: it learns, resumes exactly after kill -9, guards against NaN, and its parts do what they say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import edge_ibtm
from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.finetune import FinetuneConfig, Progress, finetune
from edge_ibtm.finetune_checkpoint import MetricsLog, load_checkpoint
from edge_ibtm.finetune_data import Augmentation, Plan, epoch_batches
from edge_ibtm.finetune_eval import evaluate, predictions
from edge_ibtm.finetune_loss import distillation, soft_targets
from edge_ibtm.statistics_sites import mask_modules

CPU = FinetuneConfig(device="cpu", lr=1e-3, batch_size=16, epochs=2, checkpoint_seconds=0)


def tiny_vit(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **small).eval()


def coloured(n: int = 64, classes: int = 4, size: int = 32) -> TensorDataset:
    """Noise images over one colour a class: learnable in a few steps."""
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (n,), generator=rng)
    colours = torch.randn(classes, 3, 1, 1, generator=rng)
    images = torch.randn(n, 3, size, size, generator=rng) * 0.3 + colours[labels]
    return TensorDataset(images, labels)


class Unlabelled(IterableDataset):
    """A stream of 40 images, as WebDataset gives them."""

    def __len__(self) -> int:
        return 40

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from coloured(40)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns_in_place_and_reports() -> None:
    model, data = tiny_vit(), coloured()
    before = evaluate(model, data).top1
    seen: list[Progress] = []
    history = finetune(model, data, data, replace(CPU, epochs=12, lr=3e-3, ema=0.9), progress=seen.append)
    assert history.top1 is not None and history.top1 > max(before, 80)
    assert history.top1 == evaluate(model, data).top1  # the averaged weights were handed over
    assert history.steps == 48 == len(seen) and not model.training
    assert history.epochs[-1].losses["loss"] < history.epochs[0].losses["loss"]
    assert seen[-1].eta_seconds == 0 and seen[0].images_per_second > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.8, "cutmix": 1.0},
        {"accumulate": 4, "layer_decay": 0.7, "warmup_epochs": 0.5},
        {"augment": Augmentation(flip=True, crop=2, randaugment=9, random_erasing=0.5)},
        {"lambda_ib": 0.1, "ib_start": 0.0, "ib_clusters": 6},
        {"lambda_ib": 0.1, "ib_conditional": False, "ib_start": 0.5},
        {"precision": "bf16"},
        {"tensorboard": True},
        {"clip_grad": 0.0, "optimizer": "sgd", "channels_last": False},
    ],
    ids=str,
)
def test_every_option_trains_and_leaves_the_model_as_it_was_built(
    changes: dict[str, object], tmp_path: Path
) -> None:
    model, data = tiny_vit(), coloured()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    forward = type(model).forward
    history = finetune(model, data, data, replace(CPU, checkpoint_dir=tmp_path, **changes))  # type: ignore[arg-type]
    after = model.state_dict()
    assert list(after) == list(before) and history.steps == 8
    assert any(not torch.equal(after[k], before[k]) for k in before)
    assert all(torch.isfinite(v).all() and v.is_contiguous() for v in after.values())
    assert model.forward.__func__ is forward  # type: ignore[attr-defined]
    if changes.get("lambda_ib"):
        assert "ib_bound" in history.epochs[-1].losses
    if changes.get("tensorboard"):
        assert list((tmp_path / "tensorboard").iterdir())


def test_the_ib_loss_comes_on_after_its_share_of_a_single_epoch() -> None:
    config = replace(CPU, epochs=1, batch_size=8, lambda_ib=0.1, ib_start=0.5, lr=1e-9, min_lr=0.0)
    parts = [
        finetune(tiny_vit(), coloured(), None, replace(config, ib_start=start)).epochs[0].losses
        for start in (0.0, 0.5, 1.0)
    ]
    share = parts[1]["ib_bound"] / parts[0]["ib_bound"]
    assert 0.8 < share < 1.25 and "ib_bound" not in parts[2], "a mean over the steps that had it"


def test_accumulation_equals_one_large_batch() -> None:
    data, models = coloured(), [tiny_vit(), tiny_vit()]
    for model, accumulate in zip(models, (1, 4)):
        finetune(model, data, None, replace(CPU, epochs=1, accumulate=accumulate))
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_distillation_pulls_towards_the_teacher() -> None:
    teacher, data = tiny_vit(), coloured()
    wrong = TensorDataset(data.tensors[0], (data.tensors[1] + 1) % 4)  # so that only the teacher can teach this
    finetune(teacher, wrong, None, replace(CPU, epochs=8, lr=3e-3))
    alone, taught = tiny_vit(), tiny_vit()
    finetune(alone, data, None, CPU)
    finetune(taught, data, None, replace(CPU, distill=20.0), teacher=teacher)
    images = data.tensors[0]
    with torch.no_grad():
        gaps = [float(distillation(m(images), teacher(images), 1.0)) for m in (alone, taught)]
    assert gaps[1] < 0.8 * gaps[0]


def test_soft_targets_and_distillation_values() -> None:
    torch.testing.assert_close(soft_targets(torch.tensor([1]), 4, 0.2), torch.tensor([[0.05, 0.85, 0.05, 0.05]]))
    logits = torch.randn(3, 5)
    assert float(distillation(logits, logits, 2.0)) == pytest.approx(0, abs=1e-6)
    p, q = torch.softmax(logits, -1), torch.softmax(logits.flip(0), -1)
    by_hand = (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(distillation(logits, logits.flip(0), 1.0), by_hand)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_plan_sees_every_image_once_and_ranks_share_the_global_batch(world: int) -> None:
    whole = [sorted(b) for b in Plan(50, 16).indices(0, 3)]
    assert len(whole) == 3 and len({i for b in whole for i in b}) == 48
    parts = [list(Plan(50, 16, 2, rank, world).indices(0, 3)) for rank in range(world)]
    for step in range(3):
        assert sorted(i for p in parts for m in p[2 * step : 2 * step + 2] for i in m) == whole[step]
    assert list(Plan(50, 16).indices(0, 3, 2)) == list(Plan(50, 16).indices(0, 3))[2:]
    assert list(Plan(50, 16).indices(0, 4)) != list(Plan(50, 16).indices(0, 3))


def test_augmentation_depends_on_seed_epoch_and_sample_only() -> None:
    data, transform = coloured(32), Augmentation(crop=4, flip=True).build()

    def images(position: tuple[int, int, int]) -> list[Tensor]:
        return [x for x, _ in epoch_batches(data, Plan(32, 8), position, transform)]

    torch.rand(7)  # the global generator's state does not matter
    assert all(torch.equal(a, b) for a, b in zip(images((0, 1, 2)), images((0, 1, 0))[2:]))
    assert not torch.equal(images((0, 1, 0))[0], images((0, 2, 0))[0])


CHILD = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_finetune import CPU, merged_vit, coloured
from dataclasses import replace
from edge_ibtm.finetune import finetune
from edge_ibtm.finetune_data import Augmentation
import torch
model, folder, die_at = merged_vit(), sys.argv[1], int(sys.argv[2])
config = replace(CPU, epochs=3, checkpoint_dir=folder, ema=0.9, mixup=0.5, lambda_ib=0.1, ib_start=0.3,
                 augment=Augmentation(crop=2, flip=True))
count = 0
def progress(now):
    global count
    count += 1
    if count == die_at:
        os.kill(os.getpid(), 9)
history = finetune(model, coloured(), None, config, progress=progress)
print("resumed at", history.resumed_at)
torch.save(model.state_dict(), folder + "/final.pt")
"""


def merged_vit() -> nn.Module:
    """A tiny ViT with IBTM, drop path and freshly seeded weights."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=32, num_heads=2, num_classes=4,
        drop_path_rate=0.2,
    ).eval()  # fmt: skip
    return edge_ibtm.insert_mergers(model, merger="ibtm", keep_ratio=0.7)


def run_child(folder: Path, die_at: int) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    code = CHILD.format(tests=str(here), root=str(here.parent))
    folder.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-c", code, str(folder), str(die_at)], capture_output=True, text=True)


def test_kill_9_in_an_epoch_and_resume_gives_the_same_weights(tmp_path: Path) -> None:
    """4 steps an epoch; killed after step 2 of epoch 0 and, resumed, after step 3 of epoch 1."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run_child(whole, 0)
    assert done.returncode == 0, done.stderr
    for die_at in (2, 5):
        assert run_child(broken, die_at).returncode == -signal.SIGKILL
    last = run_child(broken, 0)
    assert "resumed at 7" in last.stdout, last.stdout + last.stderr
    a, b = (torch.load(f / "final.pt", weights_only=True) for f in (whole, broken))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert not [p for p in broken.iterdir() if p.name.startswith(".checkpoint")]


def test_an_exception_in_the_callback_leaves_a_checkpoint(tmp_path: Path) -> None:
    def stop(now: Progress) -> None:
        if (now.epoch, now.step) == (1, 2):
            raise KeyboardInterrupt

    config = replace(CPU, checkpoint_dir=tmp_path, checkpoint_seconds=1e9)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_vit(), coloured(), None, config, progress=stop)
    resumed, whole = tiny_vit(), tiny_vit()
    assert finetune(resumed, coloured(), None, config).resumed_at == 6
    finetune(whole, coloured(), None, CPU)
    assert states_equal(resumed, whole)
    again = tiny_vit()
    assert finetune(again, coloured(), None, config).steps == 8  # finished: loaded, not trained again
    assert states_equal(again, whole)


def test_a_checkpoint_of_other_settings_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    config = replace(CPU, checkpoint_dir=tmp_path, epochs=1)
    finetune(tiny_vit(), coloured(), None, config)
    with pytest.raises(UsageError, match="other settings"):
        finetune(tiny_vit(), coloured(), None, replace(config, lr=5e-4))
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="no checkpoint of edge_ibtm"):
        finetune(tiny_vit(), coloured(), None, config)
    assert load_checkpoint(tmp_path / "nowhere", "x") is None


def test_metrics_lines_are_not_repeated_by_a_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    (tmp_path / "metrics.jsonl").open("a").write('{"step"}\n{"step": 4, "lo')  # cut short by a crash
    MetricsLog(tmp_path, first_step=2).write(3, {"loss": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in lines] == [(1, 1.0), (2, 0.5), (3, 9.0)]


class Poisoned(Dataset):
    """Images of which some are NaN."""

    def __init__(self, bad: set[int]) -> None:
        self.data, self.bad = coloured(), bad

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[i]
        return (image * float("nan") if i in self.bad else image), label


def test_nan_steps_are_skipped_and_a_diverged_run_ends() -> None:
    model = tiny_vit()
    history = finetune(model, Poisoned({3}), None, CPU)
    assert history.skipped_steps == 2 and all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(EdgeIBTMError, match="diverged: 3 steps"):
        finetune(tiny_vit(), Poisoned(set(range(64))), None, replace(CPU, max_bad_steps=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": 1.5, "precision": "int4"}, "ema is 1.5.*precision is 'int4'"),
        ({"batch_size": 10, "accumulate": 4}, "not a multiple"),
        ({"unmerged_epochs": -1}, "unmerged_epochs is -1, must be 0 or more"),
        ({"distill": 1.0}, "no teacher"),
    ],
)
def test_settings_that_cannot_be_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(tiny_vit(), coloured(), None, replace(CPU, **changes))  # type: ignore[arg-type]


def test_merging_starts_after_the_unmerged_epochs(tmp_path: Path) -> None:
    merged_at: list[int] = []
    model = tiny_vit()
    seen: list[int] = []

    def merge(m: nn.Module) -> None:
        merged_at.append(len(seen))
        edge_ibtm.insert_mergers(m, merger="ibtm", keep_ratio=0.6)

    config = replace(CPU, epochs=3, unmerged_epochs=1, ema=0.5, checkpoint_dir=tmp_path)
    finetune(model, coloured(), None, config, merge=merge, progress=lambda now: seen.append(now.step))
    assert merged_at == [4] and len(seen) == 12
    resumed = tiny_vit()
    finetune(resumed, coloured(), None, config, merge=merge)
    assert states_equal(resumed, model)


def test_the_average_has_the_fitted_statistics() -> None:
    def merge(m: nn.Module) -> None:
        edge_ibtm.insert_mergers(m, merger="ibtm", keep_ratio=0.6)

    model = tiny_vit()
    finetune(model, coloured(), None, replace(CPU, epochs=3, unmerged_epochs=2, ema=0.9998), merge=merge)
    steps = mask_modules(model)
    assert steps
    for step in steps.values():
        assert float(step.prior.sum()) == pytest.approx(1, abs=1e-4)
        assert torch.allclose(step.centroids.norm(dim=-1), torch.ones(len(step.centroids)), atol=1e-4)


def test_top1_is_of_the_weights_that_max_steps_left() -> None:
    for steps in (7, 8):  # within an epoch, and at the end of one that is not due
        model, data = tiny_vit(), coloured()
        config = replace(CPU, epochs=8, lr=3e-3, eval_every=3, max_steps=steps)
        history = finetune(model, data, data, config)
        result = evaluate(model, data)
        assert history.steps == steps and (history.top1, history.val_loss) == (result.top1, pytest.approx(result.loss))


def test_mixup_with_an_odd_batch_and_the_ib_loss() -> None:
    config = replace(CPU, epochs=1, batch_size=15, mixup=0.2, lambda_ib=0.1, ib_start=0.0)
    assert finetune(merged_vit(), coloured(60), None, config).steps == 4


def test_predictions_and_evaluation_agree_with_the_model() -> None:
    model, data = tiny_vit(), coloured(21)
    predicted, labels = predictions(model, DataLoader(data, batch_size=4), batch_size=8)
    with torch.no_grad():
        expected = model(data.tensors[0]).argmax(-1)
    assert torch.equal(predicted, expected) and torch.equal(labels, data.tensors[1])
    result = evaluate(model, data, batch_size=8)
    assert result.images == 21
    assert result.top1 == pytest.approx(100 * float((expected == labels).float().mean()))


def test_streams_train_too() -> None:
    history = finetune(tiny_vit(), Unlabelled(), coloured(16), CPU)
    assert history.steps == 4 and history.top1 is not None

"""Every ImageNet recipe validates and trains two steps on fake images of the right layout, fine-tuned and from scratch.

The fast tests replace the widest models by smaller ones of the same family; the slow ones run them as they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import edge_ibtm
from edge_ibtm.config import Recipe, parse_recipe
from edge_ibtm.data import View
from edge_ibtm.errors import UsageError
from edge_ibtm.finetune_recipe import TrainOptions, open_data, train_config, train_recipe
from edge_ibtm.recipe import head, list_recipes, load_recipe

RECIPES = sorted(name for name in list_recipes() if name.startswith("imagenet/"))
EXPECTED = {"mobilevit_xs", "mobilevit_s", "efficientvit_b1_224", "efficientvit_b1_288", "vit_small", "vit_base",
            "swin_tiny", "swin_base"}  # fmt: skip
TWINS = {"vit_small": "vit_tiny_patch16_224", "vit_base": "vit_tiny_patch16_224", "swin_base": "swin_tiny_patch4_window7_224"}
CLASSES = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder as ImageNet's: train/ and validation/, folders named by synset, photographs of odd sizes."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 3), ("validation", 2)):
        for label in range(CLASSES):
            folder = root / split / f"n0000000{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (torch.rand(90 + 7 * i, 120, 3) * 255).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    return root


def test_there_is_a_recipe_for_every_model_of_the_paper() -> None:
    assert {name.removeprefix("imagenet/") for name in RECIPES} == EXPECTED


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_its_cost_and_commands_and_keeps_the_settings_of_the_paper(name: str) -> None:
    recipe, text = load_recipe(name), head(list_recipes()[name])
    assert "Cost:" in text and f"edge-ibtm train --recipe {name}" in text and "--from-scratch" in text
    assert recipe.merge.merger == "ibtm" and recipe.merge.keep_ratio == 0.7
    assert recipe.finetune.lambda_ib == 0.1 and recipe.finetune.label_smoothing == 0.1
    assert recipe.data.augment.auto_augment and recipe.base.epochs == 300
    scratch = train_config(recipe, TrainOptions(from_scratch=True))
    assert scratch.unmerged_epochs == 30 and scratch.epochs == 300 and not scratch.distill
    tune = train_config(recipe, TrainOptions(compile=True))
    assert tune.unmerged_epochs == 0 and tune.precision == "bf16" and tune.compile
    assert tune.distill == recipe.finetune.distill > 0 and tune.ib_start == scratch.ib_start == 0.3


def two_steps(name: str, model: str, images: Path, out: Path, *, from_scratch: bool) -> None:
    weights = out.parent / "weights.safetensors"
    fake = edge_ibtm.build_model(model, num_classes=CLASSES, img_size=64)
    save_file({k: v.contiguous() for k, v in fake.state_dict().items()}, weights)
    overrides = [f"model.name={model}", f"model.weights={weights}", "model.img_size=64", f"data.source={images}",
                 "data.calibration_images=1", "data.workers=0"]  # fmt: skip
    for section in ("base", "finetune"):
        overrides += [f"{section}.{text}" for text in ("batch_size=4", "max_steps=4", "precision=fp32")]
    options = TrainOptions(
        out=out, from_scratch=from_scratch, unmerged_epochs=1 if from_scratch else None, device="cpu"
    )
    history, path = train_recipe(load_recipe(name, overrides), options)
    assert history.steps == 4 and history.skipped_steps == 0 and history.top1 is not None
    state = load_file(path)
    assert any(".merger." in key for key in state)  # merged, in scratch after the first epoch's two steps
    same = [key for key, value in fake.state_dict().items() if torch.equal(state.get(key, value), value)]
    assert len(same) < len(fake.state_dict()) / 2
    assert json.loads((out / "history.json").read_text())["history"]["steps"] == 4


@pytest.mark.parametrize(
    "name", [n if "xs" in n else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]
)
def test_recipe_fine_tunes_on_fake_data(name: str, images: Path, tmp_path: Path) -> None:
    own = load_recipe(name).model.name.split(".")[0]
    two_steps(name, TWINS.get(name.removeprefix("imagenet/"), own), images, tmp_path / "out", from_scratch=False)


@pytest.mark.parametrize("change", ["merge.keep_ratio=0.5", "data.augment.re_prob=0.3", "model.weights=other.pth"])
def test_a_checkpoint_of_another_recipe_is_not_taken(change: str, tmp_path: Path) -> None:
    names = [train_config(load_recipe("imagenet/mobilevit_s", more), TrainOptions(out=tmp_path)).of for more in ([], [change])]
    assert names[0] != names[1]
    same = train_config(load_recipe("imagenet/mobilevit_s", ["data.workers=7"]), TrainOptions(out=tmp_path))
    assert same.of == names[0]


def test_a_checkpoint_of_other_weights_in_the_same_file_is_not_taken(tmp_path: Path) -> None:
    weights, names = tmp_path / "w.safetensors", []
    for content in (b"1", b"2"):
        weights.write_bytes(content)
        recipe = load_recipe("imagenet/mobilevit_s", [f"model.weights={weights}"])
        names.append(train_config(recipe, TrainOptions(out=tmp_path)).of)
    assert names[0] != names[1]


def test_from_scratch_always_merges(tmp_path: Path) -> None:
    recipe = load_recipe("imagenet/mobilevit_s", ["base.epochs=1", "base.warmup_epochs=0"])
    assert train_config(recipe, TrainOptions(out=tmp_path, from_scratch=True)).unmerged_epochs == 0
    with pytest.raises(UsageError, match="--unmerged-epochs is 1 of 1 epochs"):
        train_config(recipe, TrainOptions(out=tmp_path, from_scratch=True, unmerged_epochs=1))
    with pytest.raises(UsageError, match="--unmerged-epochs is -1; give 0 or more"):
        train_config(recipe, TrainOptions(out=tmp_path, from_scratch=True, unmerged_epochs=-1))


def recipe_of(images: Path, classes: int | None) -> Recipe:
    section = {"source": str(images), "calibration_images": 1}
    return parse_recipe({"model": {"name": "mobilevit_xxs", "num_classes": classes}, "data": section})


def test_train_refuses_another_number_of_classes_than_the_data_has(images: Path) -> None:
    for classes in (CLASSES, None):
        assert open_data(recipe_of(images, classes), View(64))[2] == CLASSES
    with pytest.raises(UsageError, match=f"num_classes is 1000 and the data has {CLASSES} classes"):
        open_data(recipe_of(images, 1000), View(64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilevit_xs", "efficientvit_b1_224", "vit_small"])
def test_recipe_trains_from_scratch_on_fake_data(name: str, images: Path, tmp_path: Path) -> None:
    model = TWINS.get(name, load_recipe(f"imagenet/{name}").model.name.split(".")[0])
    two_steps(f"imagenet/{name}", model, images, tmp_path / "out", from_scratch=True)


@pytest.mark.slow
@pytest.mark.parametrize("from_scratch", [False, True], ids=["finetune", "scratch"])
@pytest.mark.parametrize("name", RECIPES)
def test_full_size_models_train_on_fake_data(name: str, from_scratch: bool, images: Path, tmp_path: Path) -> None:
    own = load_recipe(name).model.name.split(".")[0]
    two_steps(name, own, images, tmp_path / "out", from_scratch=from_scratch)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_ibtm.cli", *arguments], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip


def test_train_command_runs_and_resumes(images: Path, tmp_path: Path) -> None:
    arguments = ["train", "--recipe", "imagenet/mobilevit_xs", "--out", str(tmp_path), "--cpu", "--from-scratch",
                 "--unmerged-epochs", "1", "model.name=mobilevit_xxs", "model.img_size=64", f"data.source={images}",
                 "data.calibration_images=1", "data.workers=0", "base.batch_size=4", "base.precision=fp32"]  # fmt: skip
    first = command(*arguments, "base.max_steps=1")
    assert first.returncode == 0 and "after 1 steps" in first.stdout, first.stdout + first.stderr
    second = command(*arguments, "base.max_steps=3")
    assert "after 3 steps" in second.stdout and "resumed at step 1" in second.stdout, second.stdout + second.stderr


def test_train_command_says_what_is_missing(tmp_path: Path) -> None:
    done = command("train", "--recipe", "imagenet/mobilevit_xs", f"data.source={tmp_path / 'nowhere'}")
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_ib_command_prints_every_site(tmp_path: Path) -> None:
    file = tmp_path / "ib.json"
    done = command("ib", "--model", "mobilevit_xxs", "--merger", "ibtm", "--img-size", "64", "--images", "64",
                   "--json", str(file))  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert [f["place"] for f in figures][-1] == "last features" and len(figures) == 4
    assert all(f["ib"] <= f["bound_conditional"] for f in figures) and "last features" in done.stdout


def test_a_stream_whose_reader_is_not_installed_says_what_to_install() -> None:
    section = {"source": "wds/somewhere", "root": "shards"}
    recipe = parse_recipe({"model": {"name": "mobilevit_xxs", "num_classes": 3}, "data": section})
    with pytest.raises(UsageError, match="pip install webdataset"):
        open_data(recipe, View(32))


@pytest.mark.parametrize("below", ["", "b"])
def test_a_file_where_the_results_are_to_go_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="out is a file; give the name of a folder"):
        train_recipe(parse_recipe({}), TrainOptions(out=tmp_path / "out" / below))

"""One training run from a recipe, on as many processes as were launched: what `edge-ibtm train` does.

Fine-tuning (weights given): surgery, then the `finetune` section. From scratch: the `base` section's schedule, merging
from `unmerged_epochs` on, with the IB loss and distillation weights of `finetune`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.errors import UsageError
from edge_ibtm.files import refuse_file, write_text

if TYPE_CHECKING:
    from torch import nn

    from edge_ibtm.config import Recipe
    from edge_ibtm.finetune import FinetuneConfig, History, Progress


@dataclass(frozen=True)
class TrainOptions:
    """What depends on the machine and not on the recipe; see FinetuneConfig for the fields of the same name."""

    out: Path = Path("runs/train")
    from_scratch: bool = False
    unmerged_epochs: int | None = None
    sync_batchnorm: bool = False
    compile: bool = False
    tensorboard: bool = False
    resume: bool = True
    device: str = "auto"


def train_config(recipe: Recipe, options: TrainOptions) -> FinetuneConfig:
    """The loop's settings: the recipe's `finetune` section, or `base` from scratch."""
    from edge_ibtm.finetune import FinetuneConfig

    section = recipe.base if options.from_scratch else recipe.finetune
    settings = {**recipe.finetune.model_dump(), **section.model_dump()}
    if options.from_scratch:
        settings["distill"] = 0.0  # there is no teacher yet
    machine = asdict(options)
    for name in ("out", "from_scratch", "unmerged_epochs"):
        machine.pop(name)
    return FinetuneConfig(
        **settings,
        **machine,
        seed=recipe.seed,
        workers=recipe.data.workers,
        unmerged_epochs=_unmerged_epochs(section.epochs, options),
        checkpoint_dir=options.out,
        of=_identity(recipe),
    )


def _identity(recipe: Recipe) -> str:
    """What a checkpoint belongs to: model, merging and data of the recipe, and what its files hold now."""
    from edge_ibtm.cache import weights_hash
    from edge_ibtm.data_sources import fingerprint

    said = recipe.model_dump_json(include={"model", "merge", "data"}, exclude={"data": {"workers", "check"}})
    return f"{said} {weights_hash(recipe.model.weights)} {fingerprint(recipe.data)}"


def _unmerged_epochs(epochs: int, options: TrainOptions) -> int:
    """Epochs before merging: none when fine-tuning; from scratch a tenth of them unless given."""
    if options.unmerged_epochs is None:
        return max(1, epochs // 10) if options.from_scratch and epochs > 1 else 0
    if options.unmerged_epochs < 0:
        raise UsageError(f"--unmerged-epochs is {options.unmerged_epochs}; give 0 or more")
    if 0 < options.unmerged_epochs >= epochs:
        raise UsageError(
            f"--unmerged-epochs is {options.unmerged_epochs} of {epochs} epochs, so the model would never merge; "
            f"give at most {max(epochs - 1, 0)}"
        )
    return options.unmerged_epochs


def train_recipe(
    recipe: Recipe, options: TrainOptions, progress: Callable[[Progress], None] | None = None
) -> tuple[History, Path]:
    """Train, write `model.safetensors` and `history.json` into options.out, and return the history and the weights.

    Errors: UsageError for data, weights or settings that cannot be; EdgeIBTMError when training diverges.
    """
    import torch

    from edge_ibtm import build_model
    from edge_ibtm.checkpoint import save_state
    from edge_ibtm.data import view_of
    from edge_ibtm.finetune import finetune

    if recipe.model.new_head:
        raise UsageError("model.new_head is for `edge-ibtm compress`; train needs weights with the data's classes")
    refuse_file(options.out)
    config = train_config(recipe, options)
    config.check()
    view = view_of(recipe.model.name, recipe.model.img_size)
    train, val, classes = open_data(recipe, view)
    torch.manual_seed(recipe.seed)
    weights = None if options.from_scratch else recipe.model.weights
    if weights is None and not options.from_scratch:
        raise UsageError("model.weights is null: give weights to fine-tune, or pass --from-scratch")

    def build() -> nn.Module:
        return build_model(recipe.model.name, num_classes=classes, weights=weights, img_size=view.img_size)

    model = build()
    teacher = build() if config.distill else None
    history = finetune(model, train, val, config, teacher=teacher, merge=surgery(recipe), progress=progress)
    path = options.out / "model.safetensors"
    if int(os.environ.get("RANK", "0")) == 0:
        save_state(model, path)
        record = {"recipe": recipe.model_dump(mode="json"), "history": asdict(history)}
        write_text(options.out / "history.json", json.dumps(record, indent=1) + "\n")
    return history, path


def surgery(recipe: Recipe) -> Callable[[nn.Module], object]:
    """The insertion of the recipe's mergers, to be called when merging begins."""

    def insert(model: nn.Module) -> None:
        from edge_ibtm import insert_mergers

        insert_mergers(model, **recipe.merge.model_dump())

    return insert


def open_data(recipe: Recipe, view: Any) -> tuple[Any, Any, int]:
    """(train, validation, classes). wds/... and hfids/... are read as streams by timm, everything else by data.py."""
    source = recipe.data.source or ""
    if not source.startswith(("wds/", "hfids/")):
        from edge_ibtm.data import check_classes, load_data

        data = load_data(recipe.data, view, seed=recipe.seed)
        check_classes(recipe.model.num_classes, data)
        return data.train, data.test, data.num_classes
    if recipe.model.num_classes is None:
        raise UsageError(f"{source} is a stream, which does not say its classes; set model.num_classes")
    return stream(recipe, view, train=True), stream(recipe, view, train=False), recipe.model.num_classes


def stream(recipe: Recipe, view: Any, *, train: bool) -> Any:
    """timm's reader of a sharded stream (WebDataset), each process reading its own shards."""
    from edge_ibtm.data import asked_view, transform_of
    from edge_ibtm.data_sources import named_dataset

    section = recipe.data
    batch = (recipe.finetune if recipe.model.weights else recipe.base).batch_size
    split = section.train_split if train else section.test_split
    dataset = named_dataset(section, split, is_training=train, batch_size=batch, seed=recipe.seed)
    dataset.transform = transform_of(asked_view(view, section), section.augment if train else None)
    return dataset

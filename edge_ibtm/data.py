"""Data of a run: train, calibration and held-out test images that never overlap, ready for a model.

`load_data(spec)` takes anything timm's create_dataset takes; without a spec it is the built-in demo set. Transforms are
timm's, with the size, mean, std and interpolation of the model (`View`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from edge_ibtm.config import AugmentSection, DataSection
from edge_ibtm.data_sources import Source, open_sources
from edge_ibtm.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_CHECK_LIMIT = 20_000
_NORM = tuple[float, float, float]


@dataclass(frozen=True)
class View:
    """How a model wants its images: side in pixels, normalisation, resampling, share of the side kept by the crop."""

    img_size: int = 224
    mean: _NORM = (0.485, 0.456, 0.406)
    std: _NORM = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0


@dataclass(frozen=True)
class Data:
    """Three disjoint data sets of (image [3, H, W] float, label int) and what they have in common."""

    train: Images
    calibration: Images
    test: Images
    class_names: tuple[str, ...]
    mean: _NORM
    std: _NORM
    img_size: int

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def check_classes(wanted: int | None, data: Data) -> None:
    """UsageError unless `wanted` (model.num_classes; None: any) is what the data has."""
    if wanted is not None and wanted != data.num_classes:
        raise UsageError(
            f"model.num_classes is {wanted} and the data has {data.num_classes} classes; leave it out, or give "
            "data.class_map for labels of a larger set"
        )


class Images(Dataset):
    """Chosen images of a source under one transform: item -> (image [3, H, W] float32, label).

    unaugmented: the same images as evaluation sees them.
    """

    def __init__(self, source: Source, indices: list[int], transform: Any, plain: Any = None) -> None:
        self.source, self.indices, self.transform = source, indices, transform
        self.unaugmented: Images = self if plain is None else Images(source, indices, plain)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        image, label = self.source.read(self.indices[item])
        return self.transform(image), label

    def names(self) -> list[str]:
        """File names of the images, in order."""
        return [self.source.name_of(i) for i in self.indices]


def view_of(model_name: str, img_size: int | None = None) -> View:
    """The view that timm's configuration of a model asks for; `img_size` replaces its side."""
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(model_name)
    data = resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg else {})
    return View(
        img_size=img_size or data["input_size"][-1],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
    )


def asked_view(view: View, section: DataSection) -> View:
    """The view with what the data section sets in its place."""
    asked = {name: getattr(section, name) for name in ("mean", "std", "interpolation")}
    return replace(view, **{name: value for name, value in asked.items() if value is not None})


def load_data(spec: DataSection | str | None = None, view: View | None = None, *, seed: int = 0) -> Data:
    """Open a data set and split it into train, calibration and test.

    spec: a DataSection, a source string, or None for the demo set. Without a test split of its own, `test_fraction` of
    the images is held out; the calibration images are taken out of the training images.
    Errors: UsageError when the data is missing, unreadable, has one class or too few images.
    """
    section = spec if isinstance(spec, DataSection) else DataSection(source=spec)
    view = asked_view(view or View(), section)
    train, test = open_sources(section)
    parts = split_indices(section, train.size, test.size if test else None, seed)
    _check_images(section, train, [*parts[0], *parts[1]])
    _check_images(section, test or train, parts[2])
    eval_transform = transform_of(view, None)
    return Data(
        Images(train, parts[0], transform_of(view, section.augment), eval_transform),
        Images(train, parts[1], eval_transform),
        Images(test or train, parts[2], eval_transform),
        train.class_names,
        view.mean,
        view.std,
        view.img_size,
    )


def split_indices(
    spec: DataSection, train_size: int, test_size: int | None, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """(train, calibration, test) indices. test_size None: the test images are taken out of the training source."""
    order = list(range(train_size))
    random.Random(seed).shuffle(order)
    if test_size is None:
        held = max(1, round(spec.test_fraction * train_size))
        test, order = order[:held], order[held:]
    else:
        test = list(range(test_size))
        random.Random(seed + 1).shuffle(test)
    calibration, train = order[: spec.calibration_images], order[spec.calibration_images :]
    if len(train) < 2:
        raise UsageError(
            f"{train_size} images leave {len(train)} for training after {len(calibration)} for calibration"
            f"{'' if test_size else f' and {len(test)} for test'}: lower data.calibration_images or add images"
        )
    return train[: spec.train_images], calibration, test[: spec.test_images]


def transform_of(view: View, augment: AugmentSection | None) -> Any:
    """timm's transform; augment None: evaluation."""
    from timm.data import create_transform

    common: dict[str, Any] = {
        "input_size": (3, view.img_size, view.img_size),
        "mean": view.mean,
        "std": view.std,
        "interpolation": view.interpolation,
    }
    if augment is None:
        return create_transform(**common, is_training=False, crop_pct=view.crop_pct)
    transform = create_transform(
        **common,
        is_training=True,
        hflip=augment.hflip,
        scale=augment.scale,
        ratio=augment.ratio,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        re_prob=augment.re_prob,
    )
    _keep_a_bit(transform)
    return transform


def _keep_a_bit(transform: Any) -> None:
    """Posterize to one bit where timm's policies ask for none, which is black and which Pillow 13 refuses."""
    policies = [getattr(step, "ops", None) or getattr(step, "policy", None) or [] for step in transform.transforms]
    for op in [op for policy in policies for entry in policy for op in (entry if isinstance(entry, list) else [entry])]:
        if getattr(op, "name", "").startswith("Posterize"):
            op.aug_fn = _posterize


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    from timm.data.auto_augment import posterize

    return posterize(image, max(bits, 1))


def _check_images(spec: DataSection, source: Source, indices: list[int]) -> None:
    """Decode every image once, so that a bad one is reported before training and not in epoch 3."""
    if spec.check == "none" or (spec.check == "auto" and len(indices) > _CHECK_LIMIT) or spec.source is None:
        return
    bad = []
    for index in indices:
        try:
            source.read(index)
        except UsageError as err:
            bad.append(str(err))
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UsageError(bad[0] + more)

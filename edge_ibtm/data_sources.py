"""Where labelled images come from: timm's create_dataset, or the built-in demo set.

A `Source` is a list of (image, label) with class names. timm's own ImageDataset replaces an unreadable image by its
neighbour and only logs it; here an unreadable image is an error that names the file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.config import DataSection
from edge_ibtm.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

MORE_FORMATS = (".webp", ".bmp", ".tif", ".tiff", ".jfif", ".avif")  # beside timm's .png, .jpg, .jpeg
REMOTE = ("torch", "hfds", "hfids", "tfds", "wds")
_PIP = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets", "wds": "webdataset"}
_TRAIN, _TEST = ("train", "training"), ("test", "val", "valid", "validation", "eval")


@dataclass(frozen=True)
class Source:
    """Labelled images in a fixed order.

    read(i) -> (PIL image in RGB, label); name_of(i) names the image in messages.
    """

    size: int
    class_names: tuple[str, ...]
    read: Callable[[int], tuple[Image, int]]
    name_of: Callable[[int], str]


def open_sources(spec: DataSection) -> tuple[Source, Source | None]:
    """(training source, test source); the second is None when one source has to be split.

    Errors: UsageError when the path, the split, the package or the classes are missing.
    """
    if spec.source is None:
        return demo_source(), None
    if _kind(spec.source):
        train = _timm_source(spec, spec.train_split)
        test = _timm_source(spec, spec.test_split, train.class_names) if spec.test_split != spec.train_split else None
        return train, test
    root = Path(spec.source)
    if not root.exists():
        raise UsageError(
            f"no data at {spec.source!r}: give a folder of class folders, a .tar, or {', '.join(r + '/...' for r in REMOTE)}"
        )
    if root.is_file() and root.suffix != ".tar":
        raise UsageError(f"data {spec.source!r} is a file but not a .tar of class folders")
    folders = {p.name for p in root.iterdir() if p.is_dir()} if root.is_dir() else set()
    train_name = next((n for n in (spec.train_split, *_TRAIN) if n in folders), None)
    test_name = next((n for n in (spec.test_split, *_TEST) if n in folders), None)
    if train_name and test_name:
        train = _folder_source(spec, root / train_name)
        return train, _folder_source(spec, root / test_name, train.class_names)
    return _folder_source(spec, root), None


def demo_source() -> Source:
    """scikit-learn's 1,797 handwritten digits (8x8 grey, BSD), which ship with the library: no download."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255.0 / 16.0)).round().astype("uint8")

    def read(index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(images[index]).convert("RGB"), int(digits.target[index])

    return Source(len(images), tuple(str(n) for n in digits.target_names), read, lambda i: f"digit {i}")


def fingerprint(spec: DataSection) -> str:
    """Hash of what the source holds now (names, sizes, times of its files); imports nothing heavy."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    if spec.class_map and Path(spec.class_map).is_file():
        digest.update(Path(spec.class_map).read_bytes())
    place = spec.root if spec.source and _kind(spec.source) else spec.source
    if spec.source is None:
        digest.update(f"sklearn digits {version('scikit-learn')}".encode())
    elif place and Path(place).exists():
        for name, size, changed in _listing(Path(place)):
            digest.update(f"{name}\0{size}\0{changed}\n".encode())
    return digest.hexdigest()


def _listing(root: Path) -> list[tuple[str, int, int]]:
    if root.is_file():
        return [(root.name, root.stat().st_size, root.stat().st_mtime_ns)]
    found = []
    for folder, _, files in os.walk(root, followlinks=True):
        for name in files:
            path = os.path.join(folder, name)
            try:
                stat = os.stat(path)
            except FileNotFoundError:  # a link to nothing; if it is an image, reading names it
                stat = os.lstat(path)
            found.append((os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def _kind(source: str) -> str | None:
    """The create_dataset prefix of a spec, None for a path."""
    prefix = source.partition("/")[0].lower()
    return prefix if prefix in REMOTE and not Path(source).exists() else None


def _folder_source(spec: DataSection, root: Path, names: tuple[str, ...] | None = None) -> Source:
    """Images in class folders or a tar of them; `names`: the training classes, which the test must share."""
    from timm.data import create_dataset
    from timm.data.readers.img_extensions import add_img_extensions

    add_img_extensions(MORE_FORMATS)  # else images of these, and classes of nothing else, are left out without a word
    class_map: Any = ({n: i for i, n in enumerate(names)} if names else spec.class_map) or ""
    try:
        dataset = create_dataset("", root=str(root), search_split=False, class_map=class_map)
    except (RuntimeError, AssertionError, ValueError, OSError, KeyError) as err:
        raise UsageError(f"data {str(root)!r}: {_first_line(err)}") from None
    if names:
        _same_classes(root, names)
    mapping = getattr(dataset.reader, "class_to_idx", None) or getattr(dataset.reader, "class_name_to_idx", {})
    return _wrap(dataset, tuple(sorted(mapping, key=mapping.__getitem__)), str(root))


def _same_classes(root: Path, names: tuple[str, ...]) -> None:
    if not root.is_dir():
        return
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if unknown := sorted(folders - set(names)):
        raise UsageError(f"data {str(root)!r} has classes that the training images do not have: {', '.join(unknown[:5])}")


def named_dataset(spec: DataSection, split: str, **options: Any) -> Any:
    """timm's data set of torch/..., hfds/..., wds/...; options: create_dataset's. Errors: UsageError."""
    from timm.data import create_dataset

    kind, options = _kind(str(spec.source)), {**options, "class_map": spec.class_map}
    try:
        return create_dataset(str(spec.source), root=spec.root or ".", split=split, download=spec.download, **options)
    except Exception as err:  # every reader raises its own; the message is what the user needs
        if isinstance(err, ImportError) or "please install" in str(err).lower():
            need = _PIP.get(str(kind), "the package it names")
            raise UsageError(f"data {spec.source!r} needs a package that is not installed: pip install {need}") from None
        hint = "" if spec.download else "; set data.root, or data.download=true where timm can fetch it"
        raise UsageError(f"data {spec.source!r}, split {split!r}: {_first_line(err)}{hint}") from None


def _timm_source(spec: DataSection, split: str, names: tuple[str, ...] | None = None) -> Source:
    """torch/..., hfds/... and other named data sets."""
    assert spec.source is not None
    dataset, kind = named_dataset(spec, split), _kind(spec.source)
    if kind in ("wds", "tfds", "hfids"):
        limit = (spec.train_images or 0) + spec.calibration_images if split == spec.train_split else spec.test_images
        return _stream_source(dataset, spec.source, spec.train_images and limit, names)
    return _wrap(dataset, names or _class_names(dataset), spec.source)


def _stream_source(dataset: Any, name: str, limit: int | None, names: tuple[str, ...] | None) -> Source:
    """The first `limit` images of a stream (WebDataset and the like), held in memory, since splits need an index."""
    if not limit:
        raise UsageError(
            f"data {name!r} is a stream: say how many images to hold in memory with data.train_images=N data.test_images=M"
        )
    held = []
    try:
        for image, label in islice(iter(dataset), limit):
            held.append((_rgb(image), int(label)))
    except (OSError, SyntaxError, ValueError) as err:
        raise UsageError(f"image {len(held)} of {name} cannot be read ({_first_line(err)}): repair or remove it") from None
    if not held:
        raise UsageError(f"data {name!r} gave no image; check its path and its splits (data.train_split, data.test_split)")
    found = names or tuple(str(i) for i in range(1 + max(label for _, label in held)))
    if len(found) < 2:
        raise UsageError(f"data {name!r} has 1 class among its first {len(held)} images")
    return Source(len(held), found, held.__getitem__, lambda i: f"{name}[{i}]")


def _class_names(dataset: Any) -> tuple[str, ...]:
    if getattr(dataset, "classes", None):
        return tuple(str(c) for c in dataset.classes)
    features = getattr(getattr(getattr(dataset, "reader", None), "dataset", None), "features", {})
    for column in ("label", "labels", "fine_label"):
        if column in features and hasattr(features[column], "names"):
            return tuple(features[column].names)
    return tuple(str(i) for i in range(1 + max(int(dataset[i][1]) for i in range(len(dataset)))))


def _wrap(dataset: Any, class_names: tuple[str, ...], name: str) -> Source:
    """A Source over an indexable timm or torchvision data set."""
    if len(class_names) < 2:
        raise UsageError(f"data {name!r} has {len(class_names)} class; images must lie in one folder a class")
    reader = getattr(dataset, "reader", None)

    def name_of(index: int) -> str:
        try:
            return str(reader.filename(index, absolute=True))  # type: ignore[union-attr]
        except (AttributeError, NotImplementedError):
            return f"{name}[{index}]"

    def read(index: int) -> tuple[Image, int]:
        from PIL import Image as pil

        try:
            image, label = (reader[index] if reader is not None else dataset[index])[:2]
            if not isinstance(image, pil.Image):
                with pil.open(image) as opened:
                    return _rgb(opened), int(label)
            return _rgb(image), int(label)
        except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as err:
            raise UsageError(f"image {name_of(index)} cannot be read ({_first_line(err)}): repair or remove it") from None

    return Source(len(dataset), class_names, read, name_of)


def _rgb(image: Image) -> Image:
    """An image in RGB; ValueError where that would cut values off at 255, as Pillow does with wider ones."""
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode} has more than 8 bits a pixel, which RGB would cut off; save it with 8 bits")
    return image.convert("RGB")


def _first_line(err: BaseException) -> str:
    text = str(err).strip() or type(err).__name__
    return text.splitlines()[0]

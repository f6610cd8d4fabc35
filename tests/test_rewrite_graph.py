"""Rewrites of an exported graph: equal, and what is folded, moved or shared is so only where nothing else sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edge_ibtm.quantize import capture_graph
from edge_ibtm.rewrite import export_rewritten
from edge_ibtm.targets import lower
from edge_ibtm.targets.runtime import run_pte


def test_export_folds_what_depends_on_no_input():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * F.softplus(self.raw).log().detach()

    program = export_rewritten(Model(), (torch.randn(2, 4),))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [torch.ops.aten.mul.Tensor]


def test_reshapes_of_reshapes_become_one():
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lines = torch.sin(x).reshape(6, 4)
            back = lines.reshape(2, 12)  # as it was
            once = torch.cos(x).reshape(3, 8).reshape(4, 6)
            turned = back.t().reshape(24)
            return turned + once.reshape(24) + torch.exp(lines).reshape(24) + torch.exp(back).reshape(24)

    x = torch.randn(2, 12)
    program = export_rewritten(Model(), (x,))
    reshapes = [n for n in program.graph.nodes if "reshape" in str(n.target) or "view" in str(n.target)]
    assert len(reshapes) == 5  # lines, turned, once, and the two exponentials
    torch.testing.assert_close(program.module()(x), Model()(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_come_before_what_moves_values(inplace):
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.SiLU(inplace=inplace)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act((2 * x).permute(0, 2, 1).reshape(2, 3, 2, 2))
            turned = (3 * x).permute(0, 2, 1)
            return y.permute(0, 2, 3, 1), nn.functional.silu(turned) + turned

    x = torch.randn(2, 4, 3)
    program = export_rewritten(Moved(), (x,))
    order = [n.target for n in program.graph.nodes if n.target in (torch.ops.aten.silu.default, torch.ops.aten.permute.default)]
    silu, permute = torch.ops.aten.silu.default, torch.ops.aten.permute.default
    assert order == [silu, permute, permute, permute, silu]  # the last one's input is read by something else too
    for wanted, got in zip(Moved()(x), program.module()(x)):
        torch.testing.assert_close(got, wanted)


def test_numbers_added_to_a_product_are_its_bias():
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.biased, self.read = nn.Linear(4, 3, bias=False), nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            twice = self.read(x)
            return (self.plain(x) + 0.5) * (2 + self.biased(x)) * (twice + 1) * twice

    model, x = Sums().eval(), torch.randn(2, 5, 4)
    program = export_rewritten(model, (x,))
    added = [n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    layers = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(added) == 2 and [len(n.args) for n in layers].count(3) == 2
    torch.testing.assert_close(program.module()(x), model(x))


def test_numbers_added_to_a_product_of_two_matrices_are_its_bias(tmp_path):
    class Length(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rsqrt((x * x) @ torch.ones(4, 2) + 0.5)

    x = torch.randn(3, 4)
    artifact = lower(Length().eval(), x, tmp_path / "length.pte")
    program = export_rewritten(Length().eval(), (x,))
    assert artifact.subgraphs == 1 and not [n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    torch.testing.assert_close(run_pte(artifact.path, x)[0], Length()(x))


def test_repeated_operators_are_computed_once():
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.exp(x)
            y += torch.exp(x)  # writes in place: what read y before must not be reused
            z = y.reshape(-1) * 2.0
            y.mul_(3.0)
            kept = y.t().reshape(6, 2)  # a copy of y before it is written once more
            y.mul_(3.0)
            return torch.sin(x) + torch.sin(x) + z.reshape(x.shape) + y.reshape(-1).reshape(x.shape) + kept.reshape(x.shape)

    x = torch.randn(3, 4)
    program = export_rewritten(Model(), (x,))
    targets = [n.target for n in program.graph.nodes]
    assert targets.count(torch.ops.aten.sin.default) == 1
    torch.testing.assert_close(program.module()(x), Model()(x))


def test_products_with_ones_are_dropped_and_equal_constants_compared():
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ones = [torch.from_numpy(np.ones(shape, np.float32)) for shape in ((2, 4), (3, 2, 4))]
            rows = [torch.from_numpy(np.full((1, 4), 0.25, np.float32)) for _ in range(2)]
            means = [F.linear(x, row) for row in rows]
            return x * ones[0] * means[0] + (ones[1] * x).sum(0) * means[1]

    x = torch.randn(2, 4)
    program = export_rewritten(Model(), (x,))
    torch.testing.assert_close(program.module()(x), Model()(x))
    targets = [n.target for n in program.graph.nodes]
    assert targets.count(torch.ops.aten.mul.Tensor) == 3  # of four the one goes that changes no shape
    assert targets.count(torch.ops.aten.linear.default) == 2  # one mean, and the sum


def test_parameters_of_equal_content_stay_apart():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.a) + F.linear(x, self.b)

    program = export_rewritten(Model(), (torch.randn(2, 4),))
    assert sum(n.target is torch.ops.aten.linear.default for n in program.graph.nodes) == 2


def test_constants_that_are_written_in_place_are_folded_as_written():
    class Masked(nn.Module):  # as a Swin that takes images of any size makes its masks
        def forward(self, x):
            mask = torch.zeros(4)
            mask[1:3] = 5.0
            return x + mask

    x = torch.randn(2, 4)
    program = export_rewritten(Masked(), (x,))
    assert torch.equal(program.module()(x), Masked()(x))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [torch.ops.aten.add.Tensor]


def exported(model, x):
    return export_rewritten(model, (x,)).module()


@pytest.mark.parametrize("capture", [exported, capture_graph])
def test_what_is_written_in_place_and_read_elsewhere_is_read_as_written(capture):
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = 2 * x
            turned = nn.functional.silu(y.permute(0, 2, 3, 1), inplace=True)
            return turned.permute(0, 3, 1, 2) + y

    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(capture(Writes(), x)(x), Writes()(x))

"""How much of the output's precision each layer costs when it alone is quantized, and which layers to leave in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Interpreter, Node


@dataclass(frozen=True)
class LayerNoise:
    """sqnr_db: of the model's output when only the layer at `path`, of so many weights, is quantized (dB; low is bad)."""

    path: str
    node: str
    sqnr_db: float
    weights: int

    @property
    def per_weight(self) -> float:
        """The noise that leaving it in float takes away, for every weight that then stays large."""
        return float(10 ** (-self.sqnr_db / 10) / self.weights)


@dataclass(frozen=True)
class Choice:
    """Which layers a mixed-precision graph keeps in float, out of `layers`, and what that gave (dB against float)."""

    scheme: str  # of the others
    kept_in_float: tuple[LayerNoise, ...]
    layers: int
    all_int8_db: float
    sqnr_db: float
    wanted_db: float

    def __str__(self) -> str:
        head = f"{self.scheme}: {self.layers - len(self.kept_in_float)} of {self.layers} layers, SQNR {self.sqnr_db:.1f} dB"
        if not self.kept_in_float:
            return f"{head} (wanted {self.wanted_db:.0f}), none left in float"
        left = ", ".join(f"{layer.path} ({layer.sqnr_db:.1f} dB alone)" for layer in self.kept_in_float)
        return f"{head} (wanted {self.wanted_db:.0f}, all {self.scheme} {self.all_int8_db:.1f}); left in float: {left}"


def sqnr_db(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """10 log10(|wanted|^2 / |wanted - got|^2), at most 200."""
    noise = float((wanted - got).double().square().sum())
    return 200.0 if noise == 0 else min(200.0, 10 * float(torch.log10(wanted.double().square().sum() / noise)))


def fake_activation(x: torch.Tensor) -> torch.Tensor:
    """x rounded to 256 levels between its extremes (per tensor, affine)."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / 255, 2**-12)
    return ((x - low) / scale).round() * scale + low


def fake_weight(w: torch.Tensor) -> torch.Tensor:
    """w [out, ...] rounded to 255 symmetric levels per output channel."""
    scale = w.abs().flatten(1).amax(1).clamp_min(2**-12 * 127).reshape(-1, *[1] * (w.ndim - 1)) / 127
    return (w / scale).round().clamp(-127, 127) * scale


def fake_tokens(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] rounded to 256 levels between the extremes of each token, as XNNPACK measures them at run time."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(2**-24)
    return ((x - low) / scale).round() * scale + low


class _OneLayer(Interpreter):
    """Runs a captured graph, with the inputs and weights of one node rounded to int8 (None: all in float)."""

    chosen: Node | None = None
    dynamic = False

    def run_node(self, n: Node) -> object:
        if n is not self.chosen:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if self.dynamic:
            return n.target(fake_tokens(args[0]), fake_weight(args[1]), *args[2:], **kwargs)  # type: ignore[operator]
        rounded = (fake_activation(args[0]), fake_weight(args[1]), *args[2:])
        return fake_activation(n.target(*rounded, **kwargs))  # type: ignore[operator]


def sensitivity(
    graph: GraphModule, images: torch.Tensor, keep: Callable[[Node], bool], path_of: Callable[[Node], str],
    dynamic: bool = False,
) -> list[LayerNoise]:  # fmt: skip
    """The layers of a captured graph, most noise per weight first. images: one batch of the captured shape; keep: which
    nodes count; dynamic: activations are measured at run time, token by token."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and keep(n)]
    runner = _OneLayer(graph, garbage_collect_values=False)
    runner.dynamic = dynamic
    with torch.no_grad():
        wanted = _output(runner.run(images))
        values = dict(runner.env)
        found = []
        for node in nodes:
            before = _before(graph, node, values)
            runner.chosen = node
            noise = sqnr_db(wanted, _output(runner.run(images, initial_env=before)))
            found.append(LayerNoise(path_of(node), node.name, noise, values[node.args[1]].numel()))  # type: ignore[index, union-attr]
    return sorted(found, key=lambda layer: -layer.per_weight)


def affordable(layers: list[LayerNoise], most: float) -> list[LayerNoise]:
    """Those of `layers`, in their order, that together hold at most a share `most` of all their weights."""
    room, taken = most * sum(layer.weights for layer in layers), []
    for layer in layers:
        if layer.weights <= room:
            room -= layer.weights
            taken.append(layer)
    return taken


def _before(graph: GraphModule, node: Node, values: dict[Node, object]) -> dict[Node, object]:
    """The values of all nodes ahead of `node`, which do not depend on it."""
    ahead: dict[Node, object] = {}
    for other in graph.graph.nodes:
        if other is node:
            return ahead
        ahead[other] = values[other]
    return ahead


def _output(result: object) -> torch.Tensor:
    return result[0] if isinstance(result, tuple | list) else result  # type: ignore[return-value]

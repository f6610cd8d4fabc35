"""Pre-flight: what a target will make of a model, before any training.

The model is lowered with the weights it has now (random ones will do: the graph is the same) into a temporary folder.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_ibtm.errors import EdgeIBTMError, UsageError, lookup
from edge_ibtm.targets import TARGETS, Artifact

# What to write instead of an operator that a delegate leaves out or the stock runtime has no kernel for.
ADVICE = {
    "sort": "no kernel for sort: rank by counting comparisons (edge_ibtm.tokens.rank)",
    "scatter_reduce": "no kernel for scatter_reduce: multiply with an assignment matrix",
    "topk": "topk leaves the delegate: rank by counting comparisons (edge_ibtm.tokens.keep_top)",
    "gather": "gather leaves the delegate: multiply with a one-hot matrix",
    "index": "index look-ups leave the delegate: use slices, or look up constants before export",
    "native_layer_norm": "a layer norm over several axes stays outside: normalise one axis",
    "native_group_norm": "a group norm with more than one group stays outside",
    "scaled_dot_product": "fused attention is not delegated: use edge_ibtm.rewrite's split attention",
    "grid_sampler": "grid_sample leaves the delegate: resize bilinearly",
}


@dataclass(frozen=True)
class Check:
    """What lowering gave: counts of nodes, operators left outside (name -> nodes), kernels the stock runtime lacks."""

    target: str
    artifact: Artifact | None
    left_out: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    error: str | None = None
    runs_here: bool = False

    @property
    def ok(self) -> bool:
        """Whether the artifact will run: it lowered, and every operator outside the delegate has a kernel."""
        return self.error is None and not self.missing

    def lines(self) -> list[str]:
        """The findings as text, one finding a line."""
        if self.artifact is None:
            return [f"{self.target}: cannot be lowered: {self.error}", *self.advice()]
        a = self.artifact
        total = a.delegated + a.non_delegated
        share = f"{a.delegated} of {total} nodes" if a.delegated else f"no delegate, {total} nodes"
        found = [f"{self.target}: {a.subgraphs} subgraphs, {share}, {a.bytes / 1e6:.2f} MB"]
        found += [f"outside the delegate: {name} x {count}" for name, count in self.left_out.items()]
        found += [f"no kernel in the stock runtime: {name}" for name in self.missing]
        if not self.runs_here:
            found.append(f"not run here: this host cannot load {self.target} artifacts")
        return found + self.advice()

    def advice(self) -> list[str]:
        """What to change, for the operators found."""
        names = " ".join([*self.left_out, *self.missing, self.error or ""])
        return [f"hint: {text}" for key, text in ADVICE.items() if key in names]

    def require(self, allow_fallback: bool = False) -> Check:
        """Itself; EdgeIBTMError if it will not run, or (unless allow_fallback) if nodes are left outside."""
        if not self.ok:
            raise EdgeIBTMError("; ".join(self.lines()))
        if self.left_out and not allow_fallback and self.artifact and self.artifact.delegated:
            left = ", ".join(f"{name} x {count}" for name, count in self.left_out.items())
            raise EdgeIBTMError(f"{self.target} leaves out {left}; pass --allow-fallback to run them on portable kernels")
        return self


def check(model: nn.Module, example: Any, *, target: str = "xnnpack") -> Check:
    """Lower `model` for `target` into a temporary folder and say what would stay outside the delegate or not run.

    example: images [B, 3, H, W] of the size to be lowered. Raises UsageError for an unknown target.
    """
    from edge_ibtm.targets import lower

    chosen = lookup("target", target, TARGETS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{chosen.suffix}"
        try:
            artifact = lower(model, example, path, target=target)
        except UsageError:
            raise
        except (EdgeIBTMError, NotImplementedError) as error:
            return Check(target, None, error=str(error), runs_here=chosen.loads_here)
        missing = _missing(path)
        return Check(target, artifact, _significant(artifact.left_out), tuple(missing), None, chosen.loads_here)


def _missing(path: Path) -> list[str]:
    from edge_ibtm.targets.runtime import missing_kernels

    return missing_kernels(path) if path.suffix == ".pte" else []


def _significant(left_out: dict[str, int]) -> dict[str, int]:
    """Without the copy at the entry of a graph, which costs nothing and is always there."""
    return {name: count for name, count in left_out.items() if "dim_order_copy" not in name or count > 1}


def example_for(model: Any, img_size: int | None = None) -> torch.Tensor:
    """A random image [1, 3, S, S] of the size the model was made for (timm's default_cfg), or of `img_size`."""
    config = getattr(model, "default_cfg", None) or {}
    size = config.get("input_size", (3, 224, 224))
    side = (img_size, img_size) if img_size else tuple(size[1:])
    return torch.rand(1, size[0], *side)

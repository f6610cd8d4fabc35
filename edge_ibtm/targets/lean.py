"""Lowering without the work that changes nothing.

ExecuTorch's pipeline retraces the whole graph with fake tensors after every pass, regenerates Python code that nobody
runs, verifies it after every step, copies each node's ancestry at every retrace, builds patterns for operators the
graph does not hold, lists all of a program's inputs to ask whether an operator is one of them (three times for each
tensor), and resolves a class's type hints for each field that it writes. Inside `lean()` that is switched off; the
artifact is proved afterwards by running it (`verify`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.fx import GraphModule, Node

# Methods that make an ExportPass a transformation of its own: only then does it have to retrace.
_HOOKS = (
    "call_operator", "call_sym", "call_cond", "call_map", "call_scan", "call_while", "call_getitem", "call_delegate",
    "call_submodule", "placeholder", "output", "_fx", "on_attr",
)  # fmt: skip


@contextmanager
def lean() -> Iterator[None]:
    """Switch off redundant retracing, code generation, verification and provenance copies while the block runs."""
    from executorch.backends.xnnpack import _passes
    from executorch.backends.xnnpack.utils import utils as xnnpack_utils
    from executorch.exir import pass_base, pass_manager
    from executorch.exir._serialize import _dataclass
    from torch._export.verifier import Verifier
    from torch.fx import traceback

    shallow = SimpleNamespace(copy=copy.copy, deepcopy=lambda value, memo=None: value)
    base = pass_base._ExportPassBase
    with ExitStack() as stack:
        for owner, name, value in (
            (traceback, "copy", shallow),
            (Verifier, "check", lambda self, program: None),
            (Verifier, "_check_graph_module", lambda self, module: None),
            (pass_manager.ExportedProgramPassManager, "check", lambda self, program: None),
            (pass_manager.PassManager, "check", lambda self, module: None),
            (base, "call", _incremental(base.call)),
            (GraphModule, "recompile", _lazy(GraphModule.recompile)),
            (GraphModule, "print_readable", lambda self, *args, **kwargs: ""),
            (_passes.XNNPACKPassManager, "transform", _transform_needed(_passes.XNNPACKPassManager.transform)),
            (_dataclass, "get_type_hints", cache(_dataclass.get_type_hints)),
            *((xnnpack_utils, name, _of_inputs(getattr(xnnpack_utils, name)))
              for name in ("is_param", "is_buffer", "is_lifted_tensor_constant")),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, value))
        yield


def _of_inputs(real: Callable[[Any, Node], bool]) -> Callable[[Any, Node], bool]:
    """A question about the inputs of a program, answered at once for nodes that are none."""
    return lambda program, node: node.op == "placeholder" and real(program, node)


def _incremental(full: Callable[..., Any]) -> Callable[..., Any]:
    """ExportPass.call that computes shapes for new nodes only, unless the pass transforms nodes as it retraces."""
    from executorch.exir.pass_base import ExportPass, PassResult, _ExportPassBase

    def call(self: Any, module: GraphModule) -> Any:
        own = any(getattr(type(self), h, None) not in (getattr(ExportPass, h, None), getattr(_ExportPassBase, h, None))
                  for h in _HOOKS)  # fmt: skip
        if own or not _fill_values(module):
            return full(self, module)
        return PassResult(module, True)

    return call


def _fill_values(module: GraphModule) -> bool:
    """Give every call_function node its fake value; False when that cannot be done node by node."""
    mode = next((v.fake_mode for v in map(_value, module.graph.nodes) if hasattr(v, "fake_mode")), None)
    if mode is None:
        return False
    for node in module.graph.nodes:
        if node.op != "call_function" or isinstance(_value(node), torch.Tensor | tuple | list):
            continue
        inputs = torch.fx.node.map_arg((node.args, node.kwargs), _value)
        if any(_value(n) is None for n in node.all_input_nodes):
            return False
        with mode:
            node.meta["val"] = node.target(*inputs[0], **inputs[1])
    return True


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _lazy(real: Callable[[GraphModule], Any]) -> Callable[[GraphModule], Any]:
    """GraphModule.recompile that waits until the module is called."""

    def recompile(self: GraphModule) -> Any:
        real_class = type(self)

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            real(module)
            return type(module).forward(module, *args, **kwargs)

        if "_wrapped_call" not in vars(real_class):
            return real(self)
        real_class.forward = forward  # type: ignore[method-assign]
        return None

    return recompile


def _transform_needed(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """XNNPACKPassManager.transform without passes whose operators are not in the graph."""

    def transform(self: Any) -> Any:
        present = {getattr(n.target, "__name__", str(n.target)) for n in self.exported_program.graph.nodes}
        self.passes = [p for p in self.passes if _needed(p.__name__, present)]
        return real(self)

    return transform


_TRIGGERS = {
    "ConvertToUpsampleBilinear2d": (),  # for decomposed resizing; the partitioner keeps it whole
    "ConvertToSDPAPass": (),  # for decomposed fused attention; rewrite.py leaves none
    "ConvertToLinearPass": ("addmm", "aten.mm"),
    "FuseBatchNormPass": ("batch_norm",),
    "DecomposeBatchNorm": ("batch_norm",),
    "FuseActivationPass": ("relu", "hardtanh"),
    "DecomposeConcatenate": ("cat",),
    "InsertPadQDQPass": ("pad",),
    "PReLUReshapePass": ("prelu",),
}


def _needed(name: str, operators: set[str]) -> bool:
    """Whether an XNNPACK pass can find something to do among the graph's operators."""
    triggers = _TRIGGERS.get(name)
    return triggers is None or any(t in operator for t in triggers for operator in operators)

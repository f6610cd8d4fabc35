"""Which operations of a half-precision Core ML program stay in single precision: those that decide what merges.

Scores that lie closer than half precision can tell apart would be ranked in another order than in the eager model, and
tokens would merge elsewhere. Comparisons multiply by 2^100, which half cannot hold: coremltools leaves such an operation in
single precision by itself. Everything in a merge site that leads to one (norms, similarities, ranks) stays with it; what
follows the last comparison (slots, averages, copies of features) holds small integers or features and runs in half like the
rest of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def compute_precision(name: str) -> Any:
    """coremltools' `compute_precision` for "fp32", "fp16" (merge decisions in fp32) or "half" (no exception)."""
    import coremltools as ct

    if name == "fp32":
        return ct.precision.FLOAT32
    if name == "half":
        return ct.precision.FLOAT16
    decides = decision_finder()
    return ct.transform.FP16ComputePrecision(op_selector=lambda op: not decides(op))


def decision_finder() -> Callable[[Any], bool]:
    """A function that says whether a pymil operation of one program leads to a comparison in the same merge site.

    Operations belong to a site when the Python stack that torch.export recorded for them passes through site.py.
    """
    from coremltools.converters.mil.mil.scope import ScopeSource

    from edge_ibtm.site import Site

    source = inspect.getfile(Site)
    known: dict[str, bool] = {}

    def in_site(op: Any) -> bool:
        traces = op.scopes.get(ScopeSource.EXIR_STACK_TRACE) or []
        return any(trace and source in trace for trace in traces)

    def decides(op: Any) -> bool:
        waiting = [op]
        while waiting:
            current = waiting[-1]
            children = [c for var in current.outputs for c in var.child_ops if in_site(c)]
            pending = [c for c in children if c.name not in known]
            if current.name not in known and pending and not _compares(current):
                waiting.extend(pending)
                continue
            known[current.name] = _compares(current) or any(known[c.name] for c in children)
            waiting.pop()
        return known[op.name]

    return lambda op: in_site(op) and decides(op)


def _compares(op: Any) -> bool:
    """Whether a constant input is beyond half precision, as in `greater` of tokens.py."""
    from coremltools.converters.mil.mil.passes.defs.quantization import FP16ComputePrecision

    return op.op_type != "const" and FP16ComputePrecision.fp16_overflow(op)

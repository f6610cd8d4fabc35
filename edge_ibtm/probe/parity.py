"""Whether the outputs of an artifact on another CPU are right: limits for floats, and what 8-bit may differ
by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edge_ibtm.errors import DeviceError, UsageError
from edge_ibtm.probe.host import Execution
from edge_ibtm.probe.schema import Parity

FLOAT_LIMIT = 1e-4
INT8_SQNR_DB = 40.0
EAGER_MARGIN_DB = 1.0
EAGER = "eager outputs"


def parity_of(outputs: Sequence[Any], reference: Sequence[Any], name: str, limit: float) -> Parity:
    """Outputs against a reference, all tensors together; ok when no value differs by more than `limit`."""
    if [tuple(o.shape) for o in outputs] != [tuple(r.shape) for r in reference]:
        shapes = [[tuple(t.shape) for t in side] for side in (outputs, reference)]
        raise UsageError(f"outputs have shapes {shapes[0]}, {name} {shapes[1]}; is it the same model and batch?")
    signal = noise = max_abs = 0.0
    identical = True
    for mine, theirs in zip(outputs, reference, strict=True):
        a, b = mine.detach().double(), theirs.detach().double()
        signal += float(b.square().sum())
        noise += float((a - b).square().sum())
        max_abs = max(max_abs, float((a - b).abs().max())) if a.numel() else max_abs
        identical = identical and bool((a == b).all())
    if not math.isfinite(noise):
        raise DeviceError(f"outputs hold NaN or infinity where {name} does not; the kernels on this device are wrong")
    sqnr = None if noise == 0 else 10 * math.log10(signal / noise) if signal else 0.0
    return Parity(
        reference=name,
        max_abs=max_abs,
        sqnr_db=sqnr,
        identical=identical,
        ok=max_abs <= limit,
        limit=f"max abs difference <= {limit:.3g}",
    )


def judge(outputs: list[Any], here: Execution, expected: Sequence[Any] | None) -> tuple[Parity, tuple[str, ...]]:
    """Parity of another CPU's outputs with this machine's runtime, and with eager when its outputs are given.

    Floats: every value within 1e-4 (of the largest output, when that is above 1) of both. 8-bit: identical to
    this machine's; or different where float kernels run too, which explains it, and above 40 dB or, when eager
    outputs are given, as near to them as this machine's outputs are (within 1 dB). Where only eager is missed, its parity
    is the one returned: the file is then another model's.
    """
    scale = max(1.0, *(float(o.abs().max()) for o in here.outputs))
    limit = FLOAT_LIMIT * scale
    parity = parity_of(outputs, here.outputs, "the same file in this machine's runtime", limit)
    if here.quantized:
        return _judge_quantized(outputs, here, expected, parity)
    if expected is None:
        return parity, ()
    eager = parity_of(outputs, list(expected), EAGER, limit)
    if parity.ok and not eager.ok:
        return eager, (f"against {parity.reference}: max abs difference {parity.max_abs:.3g}, {_db(parity)}",)
    return parity, (f"against eager: max abs difference {eager.max_abs:.3g}, {_db(eager)}",)


def _judge_quantized(
    outputs: list[Any], here: Execution, expected: Sequence[Any] | None, parity: Parity
) -> tuple[Parity, tuple[str, ...]]:
    """`judge` for a program with 8-bit kernels; its distance to eager is the quantizer's and no gate."""
    near, limit = (parity.sqnr_db or 0.0) >= INT8_SQNR_DB, f"identical, or explained and SQNR >= {INT8_SQNR_DB:g} dB"
    notes: tuple[str, ...] = () if parity.identical else (_explain(outputs, here, parity),)
    if expected is not None:
        there = parity_of(outputs, list(expected), EAGER, math.inf)
        ours = parity_of(here.outputs, list(expected), EAGER, math.inf)
        notes += (f"8-bit against eager: {_db(there)} there, {_db(ours)} in this machine's runtime",)
        near = near or _decibel(there) >= _decibel(ours) - EAGER_MARGIN_DB
        limit += f" or as near to eager as this machine's (within {EAGER_MARGIN_DB:g} dB)"
    ok = parity.identical or (near and bool(here.float_kernels))
    return parity.model_copy(update={"ok": ok, "limit": limit}), notes


def _decibel(parity: Parity) -> float:
    return math.inf if parity.sqnr_db is None else parity.sqnr_db


def _db(parity: Parity) -> str:
    return "identical" if parity.sqnr_db is None else f"SQNR {parity.sqnr_db:.1f} dB"


def _explain(outputs: list[Any], here: Execution, parity: Parity) -> str:
    different = sum(int((a != b).sum()) for a, b in zip(outputs, here.outputs, strict=True))
    total = sum(o.numel() for o in outputs)
    found = f"int8: {different} of {total} outputs differ from x86 by at most {parity.max_abs:.3g} ({_db(parity)})"
    if not here.float_kernels:
        return f"{found}; only 8-bit kernels run in it, and those are exact on both: this is not explained"
    return (
        f"{found}. Besides 8-bit kernels, which are exact on both, it runs {', '.join(here.float_kernels)}; where these "
        "compute in float their last bit depends on the CPU, and a value next to a rounding boundary then moves by one "
        "quantization step"
    )

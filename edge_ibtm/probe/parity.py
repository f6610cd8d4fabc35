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
    this machine's, or above 40 dB with the difference explained in the notes.
    """
    scale = max(1.0, *(float(o.abs().max()) for o in here.outputs))
    limit = FLOAT_LIMIT * scale
    parity = parity_of(outputs, here.outputs, "the same file in this machine's runtime", limit)
    notes: tuple[str, ...] = ()
    if here.quantized:
        near = parity.identical or (parity.sqnr_db or 0.0) >= INT8_SQNR_DB
        parity = parity.model_copy(update={"ok": near, "limit": f"identical, or SQNR >= {INT8_SQNR_DB:g} dB"})
        notes = () if parity.identical else (_explain(outputs, here.outputs, parity),)
    if expected is None:
        return parity, notes
    eager = parity_of(outputs, list(expected), "eager outputs", limit)
    notes += (f"against eager: max abs difference {eager.max_abs:.3g}, {_db(eager)}",)
    if here.quantized:
        return parity, (*notes, "quantized: the distance to eager is the quantizer's, no gate here")
    return parity.model_copy(update={"ok": parity.ok and eager.ok}), notes


def _db(parity: Parity) -> str:
    return "identical" if parity.sqnr_db is None else f"SQNR {parity.sqnr_db:.1f} dB"


def _explain(outputs: list[Any], reference: list[Any], parity: Parity) -> str:
    different = sum(int((a != b).sum()) for a, b in zip(outputs, reference, strict=True))
    total = sum(o.numel() for o in outputs)
    return (
        f"int8: {different} of {total} outputs differ from x86 by at most {parity.max_abs:.3g} ({_db(parity)}). "
        "Integer kernels are exact on both; the floating-point operators between them (softmax, layer norm, bmm) "
        "round their last bit differently, and a value next to a rounding boundary moves by one quantization step"
    )

"""Lines of at most SHORT tokens in an exported graph: compared, picked and placed by products with constants.

Everything stays flat, [R, k] for R lines: there a delegate takes the fewest and the cheapest operators (a broadcast
over an inner axis of 4 costs XNNPACK ten times as much as a product with a constant). The numbers are those of `tokens`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import constant

SHORT = 8
LINE = 16  # as long as the lines of a grid become
WIDE = 32  # columns of XNNPACK's widest float kernel
_EPS = 1e-12


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a type; no operator in the graph when it has it already."""
    return x if x.dtype == dtype else x.to(dtype)


def summable(x: Tensor) -> Tensor:
    """x in a type that holds its sums of squares: beyond 65504 those of float16 are infinite, below 6e-8 zero."""
    return as_type(x, torch.float32) if x.dtype == torch.float16 else x


def is_short(length: int) -> bool:
    """Whether a graph is exported and lines of `length` tokens are handled here."""
    return torch.compiler.is_exporting() and length <= SHORT


def cosines(metric: Tensor) -> Tensor:
    """Cosine similarity [R, ceil(L/2), floor(L/2)] of the even with the odd tokens of metric [R, L, D].

    All pairs' products are taken: cutting and scaling them is less than cutting and scaling the features.
    """
    lines, length, _ = metric.shape
    pairs = _all_pairs(metric)
    scale = torch.rsqrt(pairs @ constant("diagonal", length, like=pairs) + _EPS)
    even, odd = (scale @ constant(kind, length, like=pairs) for kind in ("even_of_pairs", "odd_of_pairs"))
    return (pairs @ constant("even_odd", length, like=pairs) * (even * odd)).reshape(lines, (length + 1) // 2, length // 2)


def squared_lengths(metric: Tensor, factor: float, more: float) -> Tensor:
    """factor |m|^2 + more [R, L] of the tokens of metric [R, L, D], from the products that `cosines` takes."""
    pairs = _all_pairs(metric)
    return pairs @ (factor * constant("diagonal", metric.shape[1], like=pairs)) + more


def _all_pairs(metric: Tensor) -> Tensor:
    """The same [R, L * L], flat."""
    return all_products(metric).reshape(metric.shape[0], metric.shape[1] ** 2)


def all_products(metric: Tensor) -> Tensor:
    """Products [R, L, L] in float32 of all tokens of a line with each other.

    Short lines are multiplied some at once and those of different lines dropped: a delegate packs every factor anew.
    """
    metric = summable(metric)
    lines, length, dim = metric.shape
    several = _at_once(lines, length)
    together = metric.reshape(-1, several * length, dim) if several > 1 else metric
    products = as_type(together @ together.transpose(1, 2), torch.float32)
    if several == 1:
        return products
    own = products * constant("own_line", several, length, like=products)
    return (own @ constant("to_own_line", several, length, like=products)).reshape(lines, length, length)


def _at_once(lines: int, length: int) -> int:
    """How many of `lines` a wide kernel holds; 1 where their number is not known (a batch that is a dynamic dimension)."""
    if not (is_short(length) and isinstance(lines, int)):
        return 1
    return next(several for several in range(WIDE // length, 0, -1) if lines % several == 0)


def lowered(scores: Tensor, penalty: Tensor, strength: Tensor | float) -> Tensor:
    """scores [R, a, b] less the penalty [R, a + b] of their even tokens times a strength, a constant."""
    lines, evens, odds = scores.shape
    penalty = as_type(penalty, scores.dtype)
    each = as_type(strength * constant("even_of_pairs", evens + odds, like=scores), scores.dtype)
    return (scores.reshape(lines, evens * odds) - penalty @ each).reshape(scores.shape)


def assign(scores: Tensor, keep: int, drop: bool, ordered: bool) -> tuple[Tensor, Tensor]:
    """Slots [R, 1, L] and assignment [R, P, L] of `tokens.bipartite` for scores [R, a, b], without prefix or gradient."""
    lines, evens, odds = scores.shape
    length, remove = evens + odds, evens + odds - keep
    scores = scores.reshape(lines, evens * odds)
    first = torch.clamp(affine(_behind(scores, odds, evens), "places_left", 1, odds, evens), 0.0, 1.0)
    behind = _behind(_times(first * scores, "sums", evens, odds), evens, 1)
    gone = torch.clamp(affine(behind, "places_left", remove, evens, 1), 0.0, 1.0)
    if ordered:
        own = torch.clamp(affine(gone, "even_in_order", evens), min=0.0)
        odd = affine(gone, "odd_in_order", evens, odds)
        target = _times(first * _times(odd, "to_pairs", evens, odds), "sums", evens, odds)
        odd_slots = _times(odd, "odd_places", length)
    else:
        own = torch.clamp(affine(behind, "places_past", remove - 1, evens), min=0.0)
        target = _times(first, "targets", evens, odds, keep)
        odd_slots = constant("odd_slots", length, keep, 0, like=scores)
    even = own if drop else own + gone * target
    slot = _times(even, "even_places", length) + odd_slots
    far = affine(slot, "distances", keep, length) if ordered else affine(even, "distances_of_even", keep, length)
    apart = torch.clamp(far, -1.0, 1.0)
    share = 1.0 - apart * apart
    return slot.reshape(lines, 1, length), share.reshape(lines, keep, length)


def averages(share: Tensor, mass: Tensor) -> Tensor:
    """The assignment share [R, P, L] weighted by mass [R, L], its rows summing to one."""
    _, kept, length = share.shape
    weighted = _weighted(share, mass)
    total = _times(weighted, "row_sums", kept, length)
    return (weighted / torch.clamp(total, min=_EPS)).reshape(share.shape)


def sums(share: Tensor, mass: Tensor) -> Tensor:
    """share @ mass, [R, P], for an assignment or its averages share [R, P, L] and mass [R, L]; lines may be of any length.

    Products with constants, as a delegate packs the second factor of others anew and hands threads a part of each.
    """
    lines, kept, length = share.shape
    if not is_short(length):
        return ((share * mass.reshape(lines, 1, length)) @ constant("ones", length, like=share)).reshape(lines, kept)
    return _times(_weighted(share, mass), "sums", kept, length)


def _weighted(share: Tensor, mass: Tensor) -> Tensor:
    """share [R, P, L] times mass [R, L], flat: [R, P * L]."""
    lines, kept, length = share.shape
    return share.reshape(lines, kept * length) * _times(mass, "each_place", kept, length)


def _behind(x: Tensor, n: int, groups: int) -> Tensor:
    """[R, groups * p]: for entries k < j of a group of n, -1 where entry k is behind entry j, else 0; equal ones in order."""
    return torch.clamp(_times(x, "behind", n, groups), -1.0, 0.0)


def _times(x: Tensor, kind: str, *size: int) -> Tensor:
    return x @ constant(kind, *size, like=x)


def affine(x: Tensor, kind: str, *size: int) -> Tensor:
    """x @ matrix + row, the constant's last row."""
    whole = constant(kind, *size, like=x)
    return F.linear(x, whole[:-1].t().contiguous(), whole[-1].clone())

"""Token arithmetic that knows no model: how many to keep, which to merge, merge, unmerge.

Every choice is written as arithmetic on fixed shapes (a comparison is a clamp, a rank is a count, an index is a one-hot
row), so that one and the same code trains, runs eagerly and lowers into a single delegate: no sort, gather or scatter is
needed in the graph. Comparisons are exact, ties go to the lower position.

Words: a *line* is a row of tokens that merge among themselves (a whole sequence, or one row or column of a grid); R lines
of L tokens are handled at once. Even positions of a line are candidates to disappear, odd ones receive (ToMe,
arXiv 2210.09461, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import HUGE, PROTECTED, constant
from .errors import UsageError
from .short_lines import LINE, affine, all_products, as_type, assign, cosines, is_short, lowered, summable

_EPS = 1e-12


@dataclass(frozen=True)
class Route:
    """Where the tokens of R lines go.

    slot: [R, 1, L], the 1-based output position of each token; 0 for a token that is dropped.
    keep: number P of output tokens.
    soft: None, or [R, P, L], zero in value, that carries the gradient of a straight-through decision.
    hard: None, or the assignment [R, P, L] where it did not need the slots.
    """

    slot: Tensor
    keep: int
    soft: Tensor | None = None
    hard: Tensor | None = None

    def matrix(self) -> Tensor:
        """The assignment S [R, P, L]: S[p, n] = 1 when token n goes to output p."""
        if self.hard is not None:
            return self.hard
        positions = constant("positions", self.keep, like=self.slot)
        hard = torch.clamp(1.0 - torch.abs(self.slot - positions), 0.0, 1.0)
        return hard if self.soft is None else hard + self.soft


def kept_tokens(tokens: int, keep_ratio: float, prefix: int = 0) -> int:
    """Tokens left of `tokens` when a share `keep_ratio` of all but the first `prefix` is kept (rounded half up).

    Raises UsageError for a ratio outside (0, 1] or a prefix that leaves no tokens.
    """
    check_ratio(keep_ratio)
    if not 0 <= prefix <= tokens:
        raise UsageError(f"prefix {prefix} is outside 0..{tokens} (the number of tokens)")
    free = tokens - prefix
    return prefix + min(free, max(1, int(keep_ratio * free + 0.5 + 1e-9))) if free else tokens


def check_ratio(keep_ratio: float) -> None:
    """Raise UsageError unless 0 < keep_ratio <= 1."""
    if not isinstance(keep_ratio, Real):  # numpy's numbers are
        kind = type(keep_ratio).__name__
        raise UsageError(f"keep ratio {keep_ratio!r} is a {kind}; give a number in (0, 1], or a list with one a site")
    if not 0 < float(keep_ratio) <= 1:
        raise UsageError(f"keep ratio {keep_ratio!r} is outside (0, 1]; 0.7 keeps 70 % of the tokens")


def kept_grid(
    height: int, width: int, keep_ratio: float, longest: int = 16, rows_alone: bool = False, strided: bool = False
) -> tuple[int, int]:
    """The grid (H', W') whose area is nearest to keep_ratio * H * W, sides cut alike, each side at least halved at most.

    Sides longer than `longest` are cut into equal tiles that merge on their own, so H' and W' are multiples of the number of
    tiles. Small odd sides may not go down to the ratio. rows_alone: only W changes where that keeps at least 0.65 of
    it and no more tokens than both axes would: half the matching, where nothing that follows looks at the shape of the grid.
    strided: convolutions halve the merged map later on, so half the grid counts as much as the grid (12 x 11 of 14 x 14
    leaves 6 x 6 of 7 x 7, 14 x 10 leaves 7 x 5), and the sides need to be alike only to 0.3.
    Raises UsageError for a ratio outside (0, 1] or below a quarter, which one matching per axis never goes under.
    """
    check_ratio(keep_ratio)
    if keep_ratio < 0.25:
        raise UsageError(f"keep ratio {keep_ratio} cannot be met by a grid: one matching per axis keeps at least 0.25")
    sides = [[t * k for k in range((s // t + 1) // 2, s // t + 1)] for s in (height, width) for t in [tiles(s, longest)]]
    full = (height, width)

    def cost(kept: tuple[int, int]) -> tuple[float, int]:
        far, skew = _distance(kept, full, keep_ratio), abs(kept[0] / height - kept[1] / width)
        if not strided:
            return far + 0.2 * skew, -kept[0]
        return far + _distance(_halved(kept), _halved(full), keep_ratio) + (0.1 if skew <= 0.3 else 1.0) * skew, -kept[0]

    both = min(((h, w) for h in sides[0] for w in sides[1]), key=cost)
    if not rows_alone:
        return both
    narrow = min(((height, w) for w in sides[1]), key=lambda hw: _distance(hw, full, keep_ratio))
    fits = 0.65 * width <= narrow[1] < width and height * narrow[1] <= both[0] * both[1]
    return narrow if fits and _distance(narrow, full, keep_ratio) < 0.1 else both


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    """What a convolution of stride 2 leaves of a grid."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def _distance(kept: tuple[int, int], full: tuple[int, int], ratio: float) -> float:
    """How far a kept grid is from the ratio, tokens too many counting twice."""
    left = kept[0] * kept[1] / (full[0] * full[1])
    return max(ratio - left, 2 * (left - ratio))


def tiles(side: int, longest: int = 16) -> int:
    """The least number of equal tiles of at most `longest` tokens that a side can be cut into; 1 when there is none."""
    return next((t for t in range(1, side // 2 + 1) if side % t == 0 and side // t <= longest), 1)


def greater(a: Tensor, b: Tensor, tie: Tensor | float = 0.0) -> Tensor:
    """1.0 where a > b, `tie` where a == b, else 0.0; exact in float32, written without a comparison."""
    return torch.clamp((a - b) * HUGE + tie, 0.0, 1.0)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd positions of x [R, L, D]: [R, ceil(L/2), D] and [R, floor(L/2), D], by views and slices only."""
    lines, length, dim = x.shape
    pairs = length // 2
    paired = (x[:, : 2 * pairs] if length % 2 else x).reshape(lines, pairs, 2 * dim)
    even, odd = paired[..., :dim], paired[..., dim:]
    return (torch.cat([even, x[:, 2 * pairs :]], 1) if length % 2 else even), odd


def interleave(even: Tensor, odd: Tensor) -> Tensor:
    """The inverse of `halves`, as a row: [R, a, 1] and [R, b, 1] -> [R, 1, a + b]."""
    lines, pairs, _ = odd.shape
    longer = even.shape[1] > pairs
    woven = torch.cat([even[:, :pairs] if longer else even, odd], 2).reshape(lines, 1, 2 * pairs)
    return torch.cat([woven, even[:, pairs:]], 2) if longer else woven


def less(scores: Tensor, penalty: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """scores [R, a, b] less the penalty [R, a + b] of their even tokens times a strength."""
    if is_short(penalty.shape[1]):
        return lowered(scores, penalty, strength)
    return scores - strength * halves(penalty.reshape(*penalty.shape, 1))[0]


def row_max(x: Tensor) -> Tensor:
    """Maximum over the last axis, kept as an axis of 1: in an exported graph by pooling, else by pairwise maxima."""
    if torch.compiler.is_exporting() and x.shape[-1] > 2:
        row = (1, x.shape[-1])
        return F.max_pool2d(x.reshape(1, 1, -1, row[1]), row, row).reshape(*x.shape[:-1], 1)
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        x = torch.maximum(x[..., :half], x[..., n - half :])
    return x


def first_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the last axis [..., 1] and the one-hot of its first position [..., n]."""
    top = row_max(x)
    equal = greater(x, top, 1.0)
    return top, torch.clamp(equal @ constant("first", x.shape[-1], like=x), 0.0, 1.0)


def _before(values: Tensor) -> Tensor:
    """[R, L, L]: 1 in row n, column m, where entry m of values [R, L, 1] is before entry n: larger, or equal and earlier."""
    length = values.shape[1]
    return greater(values.reshape(-1, 1, length), values, constant("before", length, like=values))


def group_mean(x: Tensor) -> Tensor:
    """The mean [B, N, D] over groups of x [B, N, G, D], as the pooling of a map, which delegates take."""
    batch, count, groups, dim = x.shape
    maps = x.reshape(batch * count, groups, 1, dim).permute(0, 3, 1, 2)
    return maps.mean((2, 3), keepdim=True).reshape(batch, count, dim)


def unit(x: Tensor) -> Tensor:
    """x [..., D] scaled to unit length over the last axis."""
    dtype, x = x.dtype, summable(x)
    norm = (x * x) @ constant("ones", x.shape[-1], like=x)
    return as_type(x * torch.rsqrt(norm + _EPS), dtype)


def similarity(metric: Tensor) -> Tensor:
    """Cosine similarity [R, ceil(L/2), floor(L/2)] of the even with the odd tokens of metric [R, L, D]."""
    if is_short(metric.shape[1]):
        return cosines(metric)
    if torch.compiler.is_exporting() and metric.shape[1] <= LINE:
        return _line_cosines(metric)
    even, odd = halves(unit(metric))
    return as_type(even @ odd.transpose(1, 2), torch.float32)


def _line_cosines(metric: Tensor) -> Tensor:
    """The same for lines of a grid: cutting and scaling all their products is less than cutting and scaling wide features."""
    lines, length, _ = metric.shape
    products = all_products(metric)
    squares = (products * constant("same", length, like=products)) @ constant("ones", length, like=products)
    scale = torch.rsqrt(squares + _EPS)
    odd = F.linear(products * scale * scale.reshape(lines, 1, length), constant("odd_places", length, like=products))
    return halves(odd)[0]


def _slots(kept: Tensor) -> Tensor:
    """1-based output positions [R, 1, L] of the kept tokens, in order; meaningful only where kept is 1."""
    return kept @ constant("upto", kept.shape[-1], like=kept)


def keep_top(scores: Tensor, keep: int, prefix: int = 0, soft: Tensor | None = None) -> Route:
    """Keep the `keep` best of scores [R, L] (the prefix always), in order; drop the rest.

    soft: optional [R, L] probabilities of being kept, for straight-through training.
    """
    lines, length = scores.shape
    values = as_type(scores.detach(), torch.float32).reshape(lines, length, 1)
    if prefix:
        values = values + PROTECTED * constant("head", length, prefix, like=values).reshape(length, 1)
    kept = torch.clamp(affine(_before(values), "count", length, -1, keep), 0.0, 1.0).reshape(lines, 1, length)
    route = Route(_slots(kept) * kept, keep)
    if soft is None:
        return route
    slope = (soft - soft.detach()).reshape(lines, 1, length)
    return Route(route.slot, keep, route.matrix() * slope)


def bipartite(
    scores: Tensor, keep: int, *, prefix: int = 0, soft: Tensor | None = None, drop: bool = False, ordered: bool = False
) -> Route:
    """Merge the best-scored even tokens into their best odd partner until `keep` tokens are left.

    scores: [R, a, b] of even against odd tokens; equal scores go to the lower position. prefix: first tokens that stay
    as they are. soft: [R, a, 1] probabilities of merging, for straight-through training. drop: merged tokens vanish
    instead of being averaged in (ToFu's pruning). ordered: outputs stand in the order of their places, as grids need;
    else as ToMe's code leaves them, which decides who can pair with whom at the next site: the prefix, the even tokens
    that stay (by position, or least similar last where there is no prefix), the odd ones.
    Raises UsageError when `keep` is out of reach of one matching.
    """
    lines, evens, odds = scores.shape
    length, remove = evens + odds, evens + odds - keep
    _check_reach(length, keep, prefix)
    hard = scores.detach()
    if is_short(length) and not prefix and soft is None:
        slot, share = assign(hard, keep, drop, ordered)
        return Route(slot, keep, hard=share)
    if prefix:
        hard = hard + constant("protect_even", evens, prefix, like=hard)
        hard = hard + constant("protect_odd", odds, prefix, like=hard)
    top, partner = first_max(hard)
    before = _before(top)
    gone = torch.clamp(affine(before, "count", evens, -1, remove), 0.0, 1.0)
    if ordered:
        even_slot, odd_slot = _places_in_order(gone, odds)
        target = (partner * odd_slot.reshape(lines, 1, odds)) @ constant("ones", odds, like=scores)
        own = (1.0 - gone) * even_slot
    else:
        odd_slot = constant("odd_last", lines, odds, keep, prefix, like=hard)
        target = partner @ odd_slot[0]
        own = _own_first(before, gone, remove, prefix)
    slot = interleave(own if drop else own + gone * target, odd_slot)
    return Route(slot, keep, None if soft is None else _soft_matrix(soft, target, keep, odds))


def _own_first(before: Tensor, gone: Tensor, remove: int, prefix: int) -> Tensor:
    """Slots [R, a, 1] of the even tokens that stay, 0 for those `gone` [R, a, 1], where they stand before the odd ones."""
    lines, evens, _ = gone.shape
    if not prefix:
        return torch.clamp(affine(before, "count", evens, 1, 1 - remove), min=0.0)
    stays = (1.0 - gone).reshape(lines, 1, evens)
    slot = _slots(stays)
    if prefix > 1:
        slot = slot + constant("prefix_even", evens, prefix, like=gone)
    return (stays * slot).reshape(lines, evens, 1)


def _places_in_order(gone: Tensor, odds: int) -> tuple[Tensor, Tensor]:
    """Slots [R, a, 1] and [R, b, 1] of even and odd tokens in the order of their places, where `gone` [R, a, 1] leave."""
    slots = _slots(interleave(1.0 - gone, constant("stays", gone.shape[0], odds, like=gone)))
    return halves(slots.reshape(-1, gone.shape[1] + odds, 1))


def _soft_matrix(soft: Tensor, target: Tensor, keep: int, odds: int) -> Tensor:
    """Zero-valued [R, P, L] whose gradient is that of merging every even token into its partner with probability `soft`."""
    lines, evens, _ = soft.shape
    slope = (soft - soft.detach()).reshape(lines, 1, evens)
    even = Route(target.reshape(lines, 1, evens), keep).matrix() * slope
    pairs = torch.stack([even[..., :odds], torch.zeros_like(even[..., :odds])], -1).reshape(lines, keep, 2 * odds)
    return torch.cat([pairs, even[..., odds:]], 2)


def _check_reach(length: int, keep: int, prefix: int) -> None:
    protected = (prefix + 1) // 2
    most = (length + 1) // 2 - protected if length // 2 > prefix // 2 else 0
    if not length - most <= keep <= length:
        raise UsageError(
            f"cannot keep {keep} of {length} tokens ({prefix} protected): one matching leaves {length - most} to "
            f"{length}; raise the keep ratio or spread it over more sites"
        )


def match(metric: Tensor, keep: int, *, prefix: int = 0) -> Tensor:
    """ToMe's bipartite soft matching (arXiv 2210.09461, appendix D) with deterministic ties.

    metric: [B, N, D] features (ToMe: attention keys averaged over heads). keep: tokens left. prefix: protected first
    tokens. Returns the assignment S [B, keep, N], one 1 in every column; outputs in ToMe's order (see `bipartite`).
    """
    return bipartite(similarity(metric), keep, prefix=prefix).matrix()


def merge(x: Tensor, assignment: Tensor, size: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average tokens into the merged ones they are assigned to.

    x [B, N, D], assignment [B, P, N], size [B, N] (original tokens each stands for), weight [B, N] > 0 or None.
    Returns x' [B, P, D] with x'_p = sum_n S_pn w_n s_n x_n / sum_n S_pn w_n s_n, and size' [B, P] = S size.
    """
    mass = size if weight is None else size * weight
    shares = assignment * mass.reshape(mass.shape[0], 1, -1)
    total = shares @ constant("ones", x.shape[1], like=x)
    batch, tokens = size.shape
    sizes = assignment @ size.reshape(batch, tokens, 1)
    return (shares @ x) / torch.clamp(total, min=_EPS), sizes.reshape(batch, -1)


def unmerge(x: Tensor, assignment: Tensor) -> Tensor:
    """Copy each merged token of x [B, P, D] back to where it came from: [B, N, D]; zeros where a token was dropped."""
    return assignment.transpose(1, 2) @ x

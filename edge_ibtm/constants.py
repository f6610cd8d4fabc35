"""Small constants of the token arithmetic: matrices that count, compare, pick and place, made once for each size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

PROTECTED = 1e4  # lowers a score below every cosine, however penalised
HUGE = 2.0**100  # exact, and a clamp sees nothing but the sign of any two cosines' difference times this


def _pooled(length: int, keep: int, prefix: int) -> np.ndarray:
    """1-based slots [1, length]: the prefix stays, the rest falls into `keep - prefix` runs of as equal length as can be."""
    free = length - prefix
    runs = np.floor(np.arange(free) * (keep - prefix) / max(free, 1)) + prefix
    return np.concatenate([np.arange(prefix), runs])[None] + 1.0


def _odd_last(lines: int, odds: int, keep: int, prefix: int) -> np.ndarray:
    """1-based slots [lines, odds, 1] of odd tokens that stand behind all even ones, but for those of the prefix."""
    j = np.arange(odds)
    return np.tile(np.where(j < prefix // 2, 2 * j + 2, keep - odds + j + 1)[:, None], (lines, 1, 1))


def _pairs(n: int) -> np.ndarray:
    """[2, p]: all k < j below n; where there is none, 0 and 0."""
    return np.array([(k, j) for j in range(n) for k in range(j)] or [(0, 0)]).T


def _behind(n: int, groups: int) -> np.ndarray:
    """[g n, g p]: a group's x @ it is x_k - x_j for every k < j, times HUGE."""
    first, second = np.eye(n)[_pairs(n)]
    return np.kron(np.eye(groups), HUGE * (first - second).T)


def _standing(n: int, groups: int) -> np.ndarray:
    """[g p, g n]: entry j's position less j, from -1 where k < j stands behind it and 0 where it stands before."""
    first, second = np.eye(n)[_pairs(n)]
    return np.kron(np.eye(groups), second - first)


def _affine(matrix: np.ndarray, row: np.ndarray | float) -> np.ndarray:
    """A matrix [n, m] and a row [m] to add, as [n + 1, m]."""
    return np.concatenate([matrix, np.broadcast_to(row, (1, matrix.shape[1]))])


def _distances(keep: int, n: int) -> np.ndarray:
    """[n + 1, k n]: slots' distances from every output's."""
    return _affine(np.tile(np.eye(n), (1, keep)), -np.repeat(np.arange(keep) + 1.0, n))


def _odd_slots(length: int, keep: int, prefix: int) -> np.ndarray:
    """The same [1, length] at the places of the odd tokens, zero at those of the even ones."""
    slots = np.zeros((1, length))
    slots[:, 1::2] = _odd_last(1, length // 2, keep, prefix)[0].T
    return slots


_MAKERS: dict[str, Callable[..., np.ndarray]] = {
    "positions": lambda n: np.arange(1, n + 1)[:, None],
    "before": lambda n: np.tril(np.ones((n, n)), -1),
    "upto": lambda n: np.triu(np.ones((n, n))),
    "even_places": lambda n: np.eye(n)[::2],
    "even_odd": lambda n: np.kron(np.eye(n)[:, ::2], np.eye(n)[:, 1::2]),
    "even_of_pairs": lambda n: np.kron(np.eye(n)[:, ::2], np.ones((1, n // 2))),
    "odd_of_pairs": lambda n: np.tile(np.eye(n)[:, 1::2], (1, (n + 1) // 2)),
    "behind": _behind,
    "places_left": lambda of, n, g: _affine(-_standing(n, g), of - np.tile(np.arange(n), g)),
    "places_past": lambda of, n: _affine(_standing(n, 1), np.arange(n) - of),
    "sums": lambda n, m: np.kron(np.eye(n), np.ones((m, 1))),
    "even_in_order": lambda n: _affine(-np.triu(np.ones((n, n))) - 2 * n * np.eye(n), 2 * np.arange(n) + 1),
    "odd_in_order": lambda n, m: _affine(-np.triu(np.ones((n, m))), 2 * np.arange(m) + 2),
    "to_pairs": lambda n, m: np.tile(np.eye(m), (1, n)),
    "targets": lambda n, m, keep: np.kron(np.eye(n), _odd_last(1, m, keep, 0)[0]),
    "odd_places": lambda n: np.eye(n)[1::2],
    "each_place": lambda keep, n: np.tile(np.eye(n), (1, keep)),
    "distances": _distances,
    "distances_of_even": lambda keep, n: _affine(
        _distances(keep, n)[:-1:2], _distances(keep, n)[-1] + np.tile(_odd_slots(n, keep, 0)[0], keep)
    ),
    "row_sums": lambda keep, n: np.kron(np.eye(keep), np.ones((n, n))),
    "diagonal": lambda n: np.eye(n * n)[:, :: n + 1],
    "same": lambda n: np.eye(n),
    "own_line": lambda lines, n: np.kron(np.eye(lines), np.ones((n, n))),
    "to_own_line": lambda lines, n: np.tile(np.eye(n), (lines, 1)),
    "ones": lambda n: np.ones((n, 1)),
    "column": lambda n, i: np.eye(n)[:, i : i + 1],
    "count": lambda n, factor, start: _affine(factor * np.ones((n, 1)), start),
    "stays": lambda lines, n: np.ones((lines, n, 1)),
    "sizes": lambda lines, n: np.ones((lines, n)),
    "first": lambda n: np.eye(n) - np.triu(np.ones((n, n)), 1),
    "protect_even": lambda n, k: -PROTECTED * (np.arange(n) * 2 < k)[:, None],
    "protect_odd": lambda n, k: -PROTECTED * (np.arange(n) * 2 + 1 < k),
    "random": lambda n, m, seed: np.random.default_rng(seed).random((n, m)),
    "pooled": _pooled,
    "prefix_even": lambda n, k: np.minimum(np.arange(n), k // 2)[None],
    "odd_last": _odd_last,
    "odd_slots": _odd_slots,
    "head": lambda n, k: 1.0 * (np.arange(n) < k)[None],
}


@cache
def _constant(kind: str, *size: int) -> np.ndarray:
    return np.ascontiguousarray(_MAKERS[kind](*size), dtype=np.float32)


def constant(kind: str, *size: int, like: Tensor) -> Tensor:
    """A small constant of the dtype and on the device of `like`; exported as a constant, not as operators.

    Where a batch is exported as a dynamic dimension, the first of `size`, one row is the constant and is expanded.
    """
    if size and isinstance(size[0], torch.SymInt):
        one = constant(kind, 1, *size[1:], like=like)
        return one.expand(size[0], *one.shape[1:])
    value = torch.from_numpy(_constant(kind, *size))
    if like.dtype == torch.float32 and like.device.type in ("cpu", "meta"):
        return value
    return value.to(like.device, like.dtype)

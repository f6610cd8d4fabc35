"""Small constants of the token arithmetic: matrices that count, compare, pick and place, made once for each size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

PROTECTED = 1e4  # lowers a score below every cosine, however penalised


def _pooled(length: int, keep: int, prefix: int) -> np.ndarray:
    """1-based slots [1, length]: the prefix stays, the rest falls into `keep - prefix` runs of as equal length as can be."""
    free = length - prefix
    runs = np.floor(np.arange(free) * (keep - prefix) / max(free, 1)) + prefix
    return np.concatenate([np.arange(prefix), runs])[None] + 1.0


def _odd_last(lines: int, odds: int, keep: int, prefix: int) -> np.ndarray:
    """1-based slots [lines, 1, odds] of odd tokens that stand behind all even ones, but for those of the prefix."""
    j = np.arange(odds)
    return np.tile(np.where(j < prefix // 2, 2 * j + 2, keep - odds + j + 1), (lines, 1, 1))


def _against(n: int, groups: int) -> np.ndarray:
    """[g n, g n n]: a group's x @ it is x_k - x_j at j * n + k, times a power of two so large that a clamp sees its sign."""
    return np.kron(np.eye(groups), 2.0**100 * (np.tile(np.eye(n), (1, n)) - np.kron(np.eye(n), np.ones((1, n)))))


def _affine(matrix: np.ndarray, row: np.ndarray | float) -> np.ndarray:
    """A matrix [n, m] and a row [m] to add, as [n + 1, m]."""
    return np.concatenate([matrix, np.broadcast_to(row, (1, matrix.shape[1]))])


def _lost(n: int, groups: int) -> np.ndarray:
    """[g n n, g n]: less the sum of each n entries."""
    return -np.kron(np.eye(groups * n), np.ones((n, 1)))


def _odd_slots(length: int, keep: int, prefix: int) -> np.ndarray:
    """The same [1, length] at the places of the odd tokens, zero at those of the even ones."""
    slots = np.zeros((1, length))
    slots[:, 1::2] = _odd_last(1, length // 2, keep, prefix)[0]
    return slots


@cache
def _constant(kind: str, *size: int) -> np.ndarray:
    makers: dict[str, Callable[..., np.ndarray]] = {
        "positions": lambda n: np.arange(1, n + 1)[:, None],
        "before": lambda n: np.tril(np.ones((n, n)), -1),
        "upto": lambda n: np.triu(np.ones((n, n))),
        "even_places": lambda n: np.eye(n)[::2],
        "even_odd": lambda n: np.kron(np.eye(n)[:, ::2], np.eye(n)[:, 1::2]),
        "even_of_pairs": lambda n: np.kron(np.eye(n)[:, ::2], np.ones((1, n // 2))),
        "odd_of_pairs": lambda n: np.tile(np.eye(n)[:, 1::2], (1, (n + 1) // 2)),
        "against": _against,
        "earlier_wins": lambda n, g: np.tile(np.tril(np.ones((n, n)), -1).reshape(1, n * n), (1, g)),
        "wins": lambda of, n, g: _affine(_lost(n, g), of),
        "losses": lambda of, n: _affine(-_lost(n, 1), of),
        "sums": lambda n, m: np.kron(np.eye(n), np.ones((m, 1))),
        "even_in_order": lambda n: _affine(-np.triu(np.ones((n, n))), 2 * np.arange(n) + 1),
        "odd_in_order": lambda n, m: _affine(-np.triu(np.ones((n, m))), 2 * np.arange(m) + 2),
        "to_pairs": lambda n, m: np.tile(np.eye(m), (1, n)),
        "targets": lambda n, m, keep: np.kron(np.eye(n), _odd_last(1, m, keep, 0)[0].T),
        "odd_places": lambda n: np.eye(n)[1::2],
        "each_place": lambda keep, n: np.tile(np.eye(n), (1, keep)),
        "distances": lambda keep, n: _affine(np.tile(np.eye(n), (1, keep)), -np.repeat(np.arange(keep) + 1.0, n)),
        "row_sums": lambda keep, n: np.kron(np.eye(keep), np.ones((n, n))),
        "diagonal": lambda n: np.eye(n * n)[:, :: n + 1],
        "same": lambda n: np.eye(n),
        "own_line": lambda lines, n: np.kron(np.eye(lines), np.ones((n, n))),
        "to_own_line": lambda lines, n: np.tile(np.eye(n), (lines, 1)),
        "ones": lambda n: np.ones((n, 1)),
        "column": lambda n, i: np.eye(n)[:, i : i + 1],
        "stays": lambda lines, n: np.ones((lines, 1, n)),
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
    return np.ascontiguousarray(makers[kind](*size), dtype=np.float32)


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

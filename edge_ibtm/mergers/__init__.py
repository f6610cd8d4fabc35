"""Mergers: one file a method. A registry line adds one; the contract test then covers it.

`a+b` chains two of them at every site: `tome+drop`, `ibtm+evit` merge with the first and prune with the second.
"""

from __future__ import annotations

from ..errors import UsageError, lookup
from .ats import ATS
from .base import Merger, Tokens
from .chain import LTMP, Chain
from .controls import Identity, RandomDrop, RandomMerge, UniformPool
from .evit import EViT
from .ibtm import IBTM, IBStep
from .tofu import MaskedToFu, ToFu
from .tome import MaskedToMe, ToMe

MERGERS: dict[str, type[Merger]] = {
    "ibtm": IBTM,
    "tome": ToMe,
    "tofu": ToFu,
    "ltmp": LTMP,
    "evit": EViT,
    "ats": ATS,
    "tome_ltmp": MaskedToMe,
    "tofu_ltmp": MaskedToFu,
    "identity": Identity,
    "random": RandomMerge,
    "drop": RandomDrop,
    "uniform": UniformPool,
}

__all__ = ["MERGERS", "IBStep", "Merger", "Tokens", "check_merger", "classes_of", "make_merger"]


def classes_of(name: str) -> list[type[Merger]]:
    """The one or two classes behind a name. Raises UsageError for an unknown name, or a chain of more."""
    parts = name.split("+")
    if len(parts) > 2:
        raise UsageError(f"merger {name!r} chains {len(parts)} methods; a site takes one, or a merger+pruner pair")
    return [lookup("merger", part, MERGERS) for part in parts]


def make_merger(name: str, dim: int, classes: int) -> Merger:
    """A fresh merger, whose mask reads `dim` features a token, of a model with `classes` outputs; `a+b` chains two."""
    made = [cls(dim, classes) for cls in classes_of(name)]
    return made[0] if len(made) == 1 else Chain(*made)


def check_merger(name: str, layout: str, attention: tuple[str, ...]) -> None:
    """Raise UsageError unless the method has a meaning in this layout and with the attention its sites can see.

    attention: which of "class_attention", "received_attention" the backbone's sites provide.
    """
    classes = classes_of(name)
    if not all(layout in cls.layouts for cls in classes):
        fit = [n for n, cls in MERGERS.items() if layout in cls.layouts]
        raise UsageError(f"merger {name!r} has no meaning in the {layout} layout; these have: {', '.join(fit)}")
    missing = [need for cls in classes for need in cls.needs if need not in attention]
    if missing:
        fit = [n for n, cls in MERGERS.items() if layout in cls.layouts and set(cls.needs) <= set(attention)]
        raise UsageError(
            f"merger {name!r} reads {missing[0].replace('_', ' ')}, which this backbone's sites do not have; "
            f"use one of {', '.join(fit)}"
        )

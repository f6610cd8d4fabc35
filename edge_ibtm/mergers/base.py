"""What a merger sees and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..tokens import Route

Squares = Callable[[float, float], Tensor]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one site, or of R lines of it.

    z [B, N, D] features; size [B, N] original tokens each stands for; metric [B, N, d] what similarity is measured on;
    prefix: first tokens that stay; depth: 0..1, how deep in the backbone; weight [B, N] how much a token counts;
    penalty [B, N] tells whose score to lower where a token would disappear; importance [B, N] what pruners keep;
    logits [B, N] IBTM's mask carried from site to site; class_attention / received_attention: functions that give
    [B, N] from the block's own attention, or None where there is none; ordered: whether outputs must keep the order of
    their places (lines of a grid); summary: a function that gives what a mask reads instead of z, [B, N, d'], or None;
    masses: w s [B, N] where it is known, or None; squares: a function of a and b that gives a |z_n|^2 + b [B, N] where the
    site needs them anyhow, or None.
    """

    z: Tensor
    size: Tensor
    metric: Tensor
    prefix: int = 0
    depth: float = 0.0
    weight: Tensor | None = None
    penalty: Tensor | None = None
    importance: Tensor | None = None
    logits: Tensor | None = None
    class_attention: Callable[[], tuple[Tensor, Tensor]] | None = None
    received_attention: Callable[[], Tensor] | None = None
    ordered: bool = False
    summary: Callable[[], Tensor] | None = None
    masses: Tensor | None = None
    squares: Squares | None = None

    def mass(self) -> Tensor:
        """w s [B, N]."""
        if self.masses is not None:
            return self.masses
        return self.size if self.weight is None else self.size * self.weight

    def with_(self, **changes: object) -> Tokens:
        return replace(self, **changes)  # type: ignore[arg-type]


class Merger(nn.Module):
    """A method: first weighs the tokens of a site (`prepare`), then routes each of its lines (`route`).

    layouts: where it has a meaning. proportional: whether log sizes are added to the attention logits of merged keys.
    needs: "class_attention" or "received_attention" when the method reads the block's attention. ignores_mean: whether
    the answer stays the same when every token's mean over its features is taken from z.
    """

    layouts: tuple[str, ...] = ("sequence", "grid")
    proportional: bool = True
    needs: tuple[str, ...] = ()
    ignores_mean: bool = False

    def __init__(self, dim: int, classes: int = 0) -> None:
        super().__init__()

    def prepare(self, tokens: Tokens) -> Tokens:
        """Fill weight, penalty, importance and logits of a site's tokens; by default all tokens count alike."""
        return tokens

    def settle(self, *, first: bool, attention: bool, convolved: bool) -> None:
        """Drop the parameters that this place leaves without use, so that every learned one has a gradient.

        first: no site before it hands on a mask; attention: the site can read its block's attention; convolved:
        convolutions follow on the merged map itself, which nothing restores.
        """

    def route(self, tokens: Tokens, keep: int) -> Route:
        """Where the tokens of each line go, `keep` of them being left."""
        raise NotImplementedError

    def preserves_norm(self, tokens: Tokens) -> bool:
        """Whether merged tokens take the largest norm of their parts instead of the mean's."""
        return False

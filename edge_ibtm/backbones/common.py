"""What the families share: their description, the settings of a surgery, and blocks with sites between their halves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from ..mergers import make_merger
from ..site import Merged, Site
from ..tokens import check_ratio, kept_grid

UNBOUNDED = ("evit", "ats", "drop", "uniform", "identity")


@dataclass(frozen=True)
class Settings:
    """A surgery: which merger, how much to keep (one ratio, or one a site), in which layout, how often to match."""

    merger: str
    keep_ratio: float | Sequence[float]
    layout: str
    density: str
    classes: int


@dataclass(frozen=True)
class Family:
    """A family of backbones; the first layout and the first density are its defaults.

    handles: whether a model is of the family; insert / remove: the surgery, in place; attention: what its sites can read
    of the block's attention; twin: a tiny random model of the family for tests, with its image size.
    """

    name: str
    models: tuple[str, ...]
    layouts: tuple[str, ...]
    densities: tuple[str, ...]
    handles: Callable[[nn.Module], bool]
    insert: Callable[[nn.Module, Settings], None]
    remove: Callable[[nn.Module], None]
    attention: Callable[[nn.Module], tuple[str, ...]]
    twin: Callable[[], tuple[nn.Module, int]]


class SiteMaker:
    """Hands out the sites of one surgery in order, each with its ratio and depth, and counts them."""

    def __init__(self, settings: Settings, count: int) -> None:
        self.settings, self.count, self.made = settings, count, 0
        ratio = settings.keep_ratio
        self.ratios = [float(r) for r in ratio] if isinstance(ratio, Sequence) else [float(ratio)] * count
        if len(self.ratios) != count:
            raise UsageError(
                f"{len(self.ratios)} keep ratios for {count} sites (density {settings.density!r}); give one, or {count}"
            )
        for r in self.ratios:
            check_ratio(r)
            if settings.layout == "grid":
                kept_grid(16, 16, r)
            elif r < 0.5 and settings.merger not in UNBOUNDED:
                raise UsageError(
                    f"keep ratio {r:.3g} at one site is below 0.5, the least that one matching of a sequence leaves; "
                    "raise it, or spread it over more sites (density='block')"
                )

    def __call__(self, dim: int, longest: int = 16, rows_alone: bool = False, strided: bool = False) -> Site:
        """The next site, whose mask reads `dim` features a token; the others: see `tokens.kept_grid`."""
        settings, index = self.settings, self.made
        self.made += 1
        merger = make_merger(settings.merger, dim, settings.classes)
        depth = index / max(self.count, 1)
        return Site(merger, self.ratios[index], settings.layout, depth, longest, rows_alone, strided)


class MergedBlocks(nn.Module):
    """A stand-in for an nn.Sequential of timm blocks: the same children under the same names, and `sites` beside them.

    Iterating gives one callable a block, as timm's own loops expect; what is carried from block to block lives in that
    iteration, not on the module.
    """

    sites: nn.ModuleDict

    def __init__(self, blocks: nn.Sequential, sites: dict[int, Site]) -> None:
        super().__init__()
        check_hooks(blocks, *self.taken_apart(blocks, sites))
        for name, block in blocks._modules.items():
            self.add_module(name, block)
        self.sites, self.training = nn.ModuleDict({str(i): site for i, site in sites.items()}), blocks.training

    def taken_apart(self, blocks: nn.Sequential, sites: dict[int, Site]) -> list[nn.Module]:
        """Modules whose own forward does not run any more."""
        return [blocks[index] for index in sites]

    def blocks(self) -> list[nn.Module]:
        """timm's own blocks, in order; one that stands at two places comes twice."""
        return [block for name, block in self._modules.items() if name != "sites"]  # type: ignore[misc]

    def site(self, index: int) -> Site | None:
        return dict(self.sites.items()).get(str(index))  # type: ignore[return-value]

    def restored(self) -> nn.Sequential:
        """The nn.Sequential that was replaced."""
        blocks = nn.Sequential(*self.blocks())
        blocks.training = self.training
        return blocks

    def __len__(self) -> int:
        return len(self.blocks())

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            if chosen.start != 0 or chosen.step != 1:
                raise UsageError(f"merged blocks can be cut only at their end, not {index}: tokens merge in order")
            part = type(self).__new__(type(self))
            nn.Module.__init__(part)
            part.__dict__.update({k: v for k, v in self.__dict__.items() if not k.startswith("_")})
            for i, block in zip(chosen, self.blocks()):
                part.add_module(str(i), block)
            part.sites = nn.ModuleDict({k: s for k, s in self.sites.items() if int(k) in chosen})
            return part
        return self.blocks()[index]

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class RestoringBlocks(MergedBlocks):
    """Blocks that restore their tokens: what passes between them is the map, and the last site's plan for reuse."""

    def taken_apart(self, blocks: nn.Sequential, sites: dict[int, Site]) -> list[nn.Module]:
        return list(blocks)

    def step(self, index: int, block: nn.Module, x: Tensor, merged: Merged | None) -> tuple[Tensor, Merged | None]:
        """One block on x, and the plan that a later block without a site may reuse."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        merged: Merged | None = None
        for index, block in enumerate(self.blocks()):
            x, merged = self.step(index, block, x, merged)
        return x

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return handing_on(partial(self.step, index, block) for index, block in enumerate(self.blocks()))


def handing_on(steps: Iterable[Callable[[Tensor, Any], tuple[Tensor, Any]]]) -> Iterator[Callable[[Tensor], Tensor]]:
    """One callable a step (x, what the one before handed on or None) -> (x, what it hands on).

    Run again out of order, as gradient checkpointing does, a callable is handed what it was handed before.
    """
    handed: dict[int, Any] = {0: None}

    def call(index: int, step: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor) -> Tensor:
        x, handed[index + 1] = step(x, handed[index])
        return x

    for index, step in enumerate(steps):
        yield partial(call, index, step)


def check_hooks(*modules: nn.Module) -> None:
    """Raise UsageError where a module that a surgery replaces or takes apart has forward hooks, which would be lost."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            raise UsageError(
                f"a forward hook on {type(module).__name__} would be lost, for merging replaces it or runs its parts one by "
                "one; first remove it by the handle that registered it, or hook its attention or MLP"
            )


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what a module returns while the context lasts; nothing stays on the module."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    try:
        yield outputs
    finally:
        handle.remove()


def replace_modules(model: nn.Module, kind: type[nn.Module], change: Callable[[Any], nn.Module]) -> int:
    """Replace every child of class `kind`, anywhere in the model, by `change(child)`. Returns how many there were.

    A child that stands at several places is changed once, and is replaced at all of them.
    """
    found = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()
             if isinstance(child, kind)]  # fmt: skip
    made: dict[nn.Module, nn.Module] = {}
    for parent, name, child in found:
        if child not in made:
            made[child] = change(child)
        setattr(parent, name, made[child])
    return len(made)


def to_tokens(x: Tensor) -> Tensor:
    """A map [B, C, H, W] to tokens [B, H * W, C]."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, H * W, C] to a map [B, C, H, W]."""
    return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1]).permute(0, 3, 1, 2)


def no_attention(model: nn.Module) -> tuple[str, ...]:
    """For families whose sites cannot read a block's attention."""
    return ()

"""Model weights on disk: what a model is built from, writing it, reading it, refusing what does not fit.

Our own files are safetensors beside a `ModelSpec`; foreign ones are safetensors or .pth, and a pickle is only ever
read with weights_only.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.files import replacing

if TYPE_CHECKING:
    from torch import Tensor, nn

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True)
class MergeSpec:
    """How mergers are put into a model; keep_ratio: one for all sites, or a list with one a site."""

    merger: str = "ibtm"
    keep_ratio: float | list[float] = 0.7
    layout: str = "auto"
    density: str = "auto"


@dataclass(frozen=True)
class ModelSpec:
    """Everything that says how to build a model apart from its weights."""

    name: str
    num_classes: int
    img_size: int
    merge: MergeSpec | None = None

    def merged(self, merge: MergeSpec) -> ModelSpec:
        """The same model with mergers."""
        return replace(self, merge=merge)

    def to_json(self) -> dict[str, Any]:
        """A plain mapping, the opposite of from_json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Build from to_json's mapping."""
        merge = MergeSpec(**values["merge"]) if values.get("merge") else None
        return cls(values["name"], values["num_classes"], values["img_size"], merge)


def build(spec: ModelSpec, weights: Path | None = None) -> nn.Module:
    """The model of a spec in eval mode; `weights`: our own safetensors of exactly this spec."""
    from edge_ibtm.backbones import build_model

    model = build_model(spec.name, num_classes=spec.num_classes, img_size=spec.img_size)
    if spec.merge is not None:
        from edge_ibtm.surgery import insert_mergers

        insert_mergers(model, **asdict(spec.merge))
    if weights is not None:
        load_into(model, read_state(weights), str(weights))
    return model.eval()


def save_state(model: nn.Module, path: Path) -> None:
    """Write the state dict as safetensors under a temporary name, then rename it.

    Errors: EdgeIBTMError when the disk is full or refuses.
    """
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(save(state))  # save_file's own are readable by their owner alone
    except OSError as err:
        raise EdgeIBTMError(f"cannot write {path}: {err}; free space or choose another --out") from None


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pth file, without wrappers (EMA first) and prefixes.

    Errors: UsageError when the file is missing, is no weights file, or is a pickle that wants to run code.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"no weights file at {str(path)!r}: give a .safetensors or .pth file, or 'pretrained'")
    return _plain(_read_raw(file), str(path))


def _read_raw(file: Path) -> Any:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as err:
            raise UsageError(f"weights {str(file)!r} cannot be read as safetensors: {err}") from None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"weights {str(file)!r} refused: the pickle is no plain weights file (it holds objects that could run code, "
            "or is damaged); save it with torch.save(model.state_dict(), FILE) or as .safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise UsageError(f"weights {str(file)!r} cannot be read: {reason}") from None


def _plain(state: Any, name: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    from torch import Tensor

    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise UsageError(f"weights {name!r} hold no tensors: expected a state dict (name -> tensor)")
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k[len(prefix) :]: v for k, v in tensors.items()}
    return tensors


def is_merged(state: Iterable[str]) -> bool:
    """Whether the keys of a state are those of a model whose mergers have parameters (IBTM, LTMP)."""
    return any(".sites." in key or ".merger." in key for key in state)


def load_into(model: nn.Module, state: Mapping[str, Tensor], name: str, *, new_head: bool = False) -> None:
    """Load a state dict strictly, or say what differs.

    new_head: leave the classifier as it is when only its class count differs.
    name: the file, for messages.
    Errors: UsageError naming the missing, unexpected and differently shaped keys, or the class counts, or saying that
    the state is a merged model's and the model is not.
    """
    own = model.state_dict()
    if is_merged(state) and not is_merged(own):
        raise UsageError(
            f"weights {name!r} are those of a merged model: give the keep ratio and merger it was made with "
            "(--keep-ratio, --merger), or, to compress or train, the weights of its base"
        )
    shapes = {k: (tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own and v.shape != own[k].shape}
    head = {k for k in shapes if _is_head(model, k)}
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    if shapes and len(shapes) == len(head) and not missing and not unexpected:
        theirs, ours = next(iter(shapes.values()))
        if not new_head:
            raise UsageError(
                f"weights {name!r} have {theirs[0]} classes, not {ours[0]}: give --classes {theirs[0]} or, to compress or "
                "train, data with the same classes (data.class_map orders them); compress also takes model.new_head=true, "
                "to train a new head"
            )
        state = {k: v for k, v in state.items() if k not in head}
    elif shapes or missing or unexpected:
        raise UsageError(f"weights {name!r} are of another architecture: {_difference(missing, unexpected, shapes)}")
    model.load_state_dict(dict(state), strict=not new_head)


def _is_head(model: nn.Module, key: str) -> bool:
    """Whether a key belongs to timm's classifier."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or "head"
    names = (names,) if isinstance(names, str) else names
    return any(key.startswith(f"{n}.") for n in names)


def _difference(missing: list[str], unexpected: list[str], shapes: Mapping[str, Any]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys missing (e.g. {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} keys unexpected (e.g. {unexpected[0]})")
    if shapes:
        key, (theirs, ours) = next(iter(shapes.items()))
        parts.append(f"{len(shapes)} shapes differ (e.g. {key}: file {list(theirs)}, model {list(ours)})")
    return ", ".join(parts)

"""Targets: one file a target family, one registry line a target.

`lower` writes the artifact of an eager module, or of a converted PT2E graph module, for one target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_ibtm.errors import UsageError, lookup
from edge_ibtm.files import refuse_folder
from edge_ibtm.targets.common import Artifact, check_example, check_floating

__all__ = ["TARGETS", "Artifact", "Target", "lower"]


@dataclass(frozen=True)
class Target:
    """A backend with its file suffix, and whether its artifact can be run on this host."""

    name: str
    suffix: str
    lower: Callable[..., Artifact]
    loads_here: bool
    about: str


def _xnnpack(model: Any, example: Any, path: Path, **options: Any) -> Artifact:
    from edge_ibtm.targets.xnnpack import lower_xnnpack

    return lower_xnnpack(model, example, path, **options)


def _portable(model: Any, example: Any, path: Path, **options: Any) -> Artifact:
    from edge_ibtm.targets.portable import lower_portable

    return lower_portable(model, example, path, **options)


def _vulkan(model: Any, example: Any, path: Path, **options: Any) -> Artifact:
    from edge_ibtm.targets.vulkan import lower_vulkan

    return lower_vulkan(model, example, path, **options)


def _torch(model: Any, example: Any, path: Path, **options: Any) -> Artifact:
    from edge_ibtm.targets.torch_ import lower_torch

    return lower_torch(model, example, path, **options)


def _coreml(model: Any, example: Any, path: Path, **options: Any) -> Artifact:
    from edge_ibtm.targets.coreml import CoreMLOptions, lower_coreml

    given = options.pop("options", None)
    return lower_coreml(model, example, path, given or CoreMLOptions(**options))


def _coreml_pte(model: Any, example: Any, path: Path, **options: Any) -> Artifact:
    from edge_ibtm.targets.coreml_pte import lower_coreml_pte

    return lower_coreml_pte(model, example, path, **options)


TARGETS: dict[str, Target] = {
    "xnnpack": Target("xnnpack", ".pte", _xnnpack, True, "CPU of Android, iOS and desktop (ExecuTorch)"),
    "portable": Target("portable", ".pte", _portable, True, "ExecuTorch's portable kernels, no delegate"),
    "vulkan": Target("vulkan", ".pte", _vulkan, False, "GPU of Android (ExecuTorch); lowered here, not run here"),
    "coreml": Target("coreml", ".mlpackage", _coreml, False, "Apple neural engine, GPU, CPU (Core ML)"),
    "coreml_pte": Target("coreml_pte", ".pte", _coreml_pte, False, "Core ML as a delegate of ExecuTorch (iOS, macOS), fp16"),
    "torch": Target("torch", ".pt2", _torch, True, "torch.export program for PyTorch on CPU or CUDA"),
}


def lower(model: Any, example: Any, path: str | Path, *, target: str = "xnnpack", **options: Any) -> Artifact:
    """Write the artifact of `model` for `target` to `path`, and say what is in it.

    model: an eager module (rewritten first, `rewrite.prepare_for_export`; itself untouched) or a converted PT2E
    graph module. example: images [B, 3, H, W], or a tuple holding them; the artifact accepts this shape only.
    Raises UsageError for an unknown target, a path that is a folder or lacks the target's suffix, or an example of the
    wrong kind or of integers, EdgeIBTMError when lowering fails. The file appears at `path` only when complete.
    """
    chosen, path = lookup("target", target, TARGETS), Path(path)
    if path.suffix != chosen.suffix:
        raise UsageError(f"target {target} writes {chosen.suffix} files, not {path.name!r}; name it *{chosen.suffix}")
    if target != "coreml":  # its packages are folders
        refuse_folder(path)
    inputs = check_example(example)
    for each in inputs:
        check_floating(each)
    return chosen.lower(model, inputs, path, **options)

"""Whether what a recipe names is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from edge_ibtm.config import Recipe
from edge_ibtm.errors import UsageError, lookup, suggest


def check_names(recipe: Recipe) -> None:
    """UsageError that lists every unknown name, of model, merger, targets or device, with its path. Builds nothing."""
    from edge_ibtm.backbones import check_name
    from edge_ibtm.mergers import classes_of
    from edge_ibtm.targets import TARGETS

    checks: list[tuple[str, Callable[[], object]]] = [
        ("model.name", partial(check_name, recipe.model.name)),
        ("merge.merger", partial(classes_of, recipe.merge.merger)),
        *(("lower.targets", partial(lookup, "target", name, TARGETS)) for name in recipe.lower.targets),
        ("probe.device", partial(_check_device, recipe.probe.device)),
    ]
    faults = []
    for path, check in checks:
        try:
            check()
        except UsageError as err:
            faults.append(f"{path}: {err}")
    if faults:
        raise UsageError("\n  ".join(faults))


def _check_device(device: str) -> None:
    kind = device.partition(":")[0]
    if kind not in ("host", "android"):
        raise UsageError(f"{device!r} runs no .pte; {suggest(kind, ['host', 'android'])}")

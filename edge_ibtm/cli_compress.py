"""`edge-ibtm compress`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edge_ibtm.config import Recipe

_OPTIONS = {
    "model": "model.name",
    "weights": "model.weights",
    "img_size": "model.img_size",
    "data": "data.source",
    "merger": "merge.merger",
    "keep_ratio": "merge.keep_ratio",
    "macs": "merge.macs",
    "epochs": "finetune.epochs",
    "distill": "finetune.distill",
    "quantize": "quantize.scheme",
    "target": "lower.targets",
    "max_drop": "verify.max_drop",
    "threads": "probe.threads",
    "device": "probe.device",
    "seed": "seed",
}


def register(app: typer.Typer) -> None:
    """Add this module's command to the command line."""
    app.command("compress")(compress)


def compress(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="recipe overrides, e.g. finetune.lr=1e-4")
    ] = None,
    model: Annotated[str | None, typer.Option(help="timm name of the backbone", show_default="mobilevit_s")] = None,
    recipe: Annotated[str | None, typer.Option(help="recipe file, or a name of `edge-ibtm recipe ls`")] = None,
    data: Annotated[
        str | None, typer.Option(help="folder, .tar, torch/..., hfds/..., wds/...; default: the built-in demo set")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="pretrained, or a .safetensors/.pth file; default: train a base")
    ] = None,
    img_size: Annotated[str | None, typer.Option(metavar="INTEGER", help="side of the input in pixels")] = None,
    merger: Annotated[str | None, typer.Option(help="a merger of `edge-ibtm list`")] = None,
    keep_ratio: Annotated[
        str | None, typer.Option(metavar="FLOAT", help="tokens kept / tokens entering, in (0, 1]")
    ] = None,
    macs: Annotated[
        str | None, typer.Option(metavar="FLOAT", help="instead: share of the base's MACs to meet, e.g. 0.84")
    ] = None,
    epochs: Annotated[str | None, typer.Option(metavar="INTEGER", help="epochs of fine-tuning")] = None,
    distill: Annotated[str | None, typer.Option(metavar="FLOAT", help="weight of distillation from the base")] = None,
    quantize: Annotated[str | None, typer.Option(help="none, auto, int8, int8_dynamic, mixed or qat")] = None,
    target: Annotated[str | None, typer.Option(help="comma-separated targets, e.g. xnnpack,coreml")] = None,
    max_drop: Annotated[
        str | None, typer.Option(metavar="FLOAT", help="top-1 points a stage may lose against the previous one")
    ] = None,
    threads: Annotated[str | None, typer.Option(metavar="INTEGER", help="threads of the probe")] = None,
    device: Annotated[str | None, typer.Option(help="where to probe: host, android[:SERIAL]")] = None,
    seed: Annotated[str | None, typer.Option(metavar="INTEGER", help="of splits, training and surgery")] = None,
    out: Annotated[Path | None, typer.Option(help="run directory; default: runs/<model>")] = None,
) -> None:
    """Train or load, merge, fine-tune, quantize, lower, verify, probe, report.

    Every stage is cached in the run directory; the same command resumes an interrupted run and redoes only what changed.
    """
    options = {k: v for k, v in locals().items() if k in _OPTIONS and v is not None}
    chosen, why = choose_recipe(options, recipe, overrides or [])
    run(chosen, why, out)


def run(recipe: Recipe, why: str, out: Path | None) -> None:
    """Carry out a recipe with progress on stderr, print the table on stdout, fail on missed gates."""
    from rich.console import Console

    from edge_ibtm.cli_progress import RichWatch
    from edge_ibtm.pipeline import compress as carry_out
    from edge_ibtm.report_text import print_report

    with RichWatch() as watch:
        watch.note(why)
        report = carry_out(recipe, out, watch=watch)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    values = report.to_json()
    print_report(values, console)
    folder = Path(values["run"])
    console.print(
        f"\n{folder}/report.html, report.md, report.json; {values['seconds']:.0f} s", highlight=False, soft_wrap=True
    )
    report.require()


def choose_recipe(options: dict[str, str], recipe: str | None, overrides: list[str]) -> tuple[Recipe, str]:
    """The recipe of a command line, and the reason for it that is printed.

    options: values of _OPTIONS as typed. Without --recipe: the model's own recipe for the demo set, and general settings
    for data of one's own.
    """
    from edge_ibtm.config import parse_recipe
    from edge_ibtm.recipe import apply_overrides, find_recipe, give_way, read_yaml, recipe_for

    typed = {key.strip(): value.strip() for key, _, value in (text.partition("=") for text in overrides)}
    name = options.get("model", typed.get("model.name", "mobilevit_s"))
    own_data = "data" in options or "data.source" in typed
    if recipe is not None:
        path = find_recipe(recipe)
        why = f"recipe {path}"
    elif own_data:
        path, why = None, f"general settings for {name} on {options.get('data', 'the given data')}"
    else:
        path = recipe_for(name)
        why = f"recipe {path.name}: the built-in demo set" if path else f"no recipe of its own for {name}: general settings"
    values: dict[str, Any] = read_yaml(path) if path else {"model": {"name": name}}
    values = apply_overrides(give_way(values, [_OPTIONS[option] for option in options]), overrides)
    for option, value in options.items():
        values = _set(values, _OPTIONS[option].split("."), value)
    return parse_recipe(values, str(path.name) if path else "settings"), why


def _set(values: dict[str, Any], keys: list[str], value: str) -> dict[str, Any]:
    """A copy of `values` with one key set; options are strings that pydantic converts."""
    if len(keys) == 1:
        return {**values, keys[0]: value}
    below = values.get(keys[0])
    return {**values, keys[0]: _set(below if isinstance(below, dict) else {}, keys[1:], value)}

"""`edge-ibtm train` and `edge-ibtm ib`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edge_ibtm.finetune import Progress
    from edge_ibtm.ib import IBMeasure


def register(app: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.command("train")(train)
    app.command("ib")(ib)


def train(
    recipe: Annotated[str, typer.Option(help="recipe name or file, e.g. imagenet/mobilevit_s")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="recipe overrides")] = None,
    out: Annotated[Path, typer.Option(help="folder of checkpoints, metrics and weights")] = Path("runs/train"),
    from_scratch: Annotated[bool, typer.Option(help="ignore model.weights and follow the base section")] = False,
    unmerged_epochs: Annotated[int | None, typer.Option(help="epochs before merging starts")] = None,
    sync_batchnorm: Annotated[bool, typer.Option(help="batch statistics over all processes (GPU)")] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile")] = False,
    tensorboard: Annotated[bool, typer.Option(help="write TensorBoard events into OUT/tensorboard")] = False,
    fresh: Annotated[bool, typer.Option(help="do not continue from OUT/checkpoint.pt")] = False,
    cpu: Annotated[bool, typer.Option(help="do not use a GPU")] = False,
) -> None:
    """Fine-tune (or train from scratch) a merged model; under torchrun on every process it starts."""
    from edge_ibtm.finetune_recipe import TrainOptions, train_recipe
    from edge_ibtm.recipe import load_recipe

    options = TrainOptions(
        out, from_scratch, unmerged_epochs, sync_batchnorm, compile, tensorboard, not fresh, "cpu" if cpu else "auto"
    )
    with _ProgressLine() as line:
        history, path = train_recipe(load_recipe(recipe, overrides or []), options, line.show)
    if _first_process():
        top1 = "no validation images" if history.top1 is None else f"top-1 {history.top1:.2f} %"
        resumed = "" if history.resumed_at is None else f", resumed at step {history.resumed_at}"
        typer.echo(f"{path}: {top1} after {history.steps} steps, {history.seconds:.0f} s{resumed}")


class _ProgressLine:
    """A rich progress bar with loss, speed and time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
        self.bar = Progress(*columns, disable=not _first_process())
        self.task = self.bar.add_task("train", figures="")

    def __enter__(self) -> _ProgressLine:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def show(self, now: Progress) -> None:
        """Draw one step."""
        minutes, seconds = divmod(int(now.eta_seconds), 60)
        self.bar.update(
            self.task,
            total=now.epochs * now.steps,
            completed=now.epoch * now.steps + now.step,
            description=f"epoch {now.epoch + 1}/{now.epochs}",
            figures=f"loss {now.loss:.3f}  {now.images_per_second:.0f} images/s  {minutes}:{seconds:02d} left",
        )


def _first_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def ib(
    model: Annotated[str, typer.Option(help="timm name")] = "mobilevit_s",
    weights: Annotated[str | None, typer.Option(help="'pretrained', or a .safetensors or .pth file")] = None,
    data: Annotated[str | None, typer.Option(help="as in a recipe's data.source; none: the demo set")] = None,
    merger: Annotated[str, typer.Option(help="a name of `edge-ibtm list`; identity measures the base")] = "identity",
    keep_ratio: Annotated[float, typer.Option(help="tokens kept / tokens entering")] = 0.7,
    img_size: Annotated[int | None, typer.Option(min=1, help="side in pixels")] = None,
    images: Annotated[int, typer.Option(min=1, help="at most so many held-out images")] = 2000,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here too")] = None,
) -> None:
    """Information bottleneck loss (nats) of a model on held-out images, after every site and of the last features.

    `weights` may be those of the base or of the merged model. Base weights with IBTM: its buffers are first filled from
    training images.
    """
    from edge_ibtm.data import load_data, view_of
    from edge_ibtm.ib import model_ib

    loaded = load_data(data, view_of(model, img_size))
    net, filled = _merged_model(model, weights, (merger, keep_ratio), loaded)
    measures = model_ib(net, loaded.test, classes=loaded.num_classes, images=images)
    if weights is None:
        typer.echo("no --weights: these are figures of a model with random weights")
    if filled:
        typer.echo(f"buffers of {filled} mask modules filled from {min(2048, len(loaded.train))} training images")
    _print(measures)
    if json_file is not None:
        _write(json_file, measures)


def _merged_model(name: str, weights: str | None, merge: tuple[str, float], data: Any) -> tuple[Any, int]:
    """The merged model and the number of mask modules that had to be filled (0: they came with the weights)."""
    import torch

    from edge_ibtm import build_model, insert_mergers
    from edge_ibtm.checkpoint import is_merged, load_into, read_state
    from edge_ibtm.finetune_data import Plan, sample_batches
    from edge_ibtm.statistics_sites import refresh_mask_buffers

    torch.manual_seed(0)
    state = read_state(weights) if weights not in (None, "pretrained") else None  # type: ignore[arg-type]
    complete = state is not None and is_merged(state)
    start = None if complete else weights
    model = build_model(name, num_classes=data.num_classes, weights=start, img_size=data.img_size)
    insert_mergers(model, merger=merge[0], keep_ratio=merge[1])
    if complete:
        load_into(model, state, str(weights))  # type: ignore[arg-type]
        return model, 0
    batches = sample_batches(data.train, Plan(len(data.train), 64), 2048)
    return model, refresh_mask_buffers(model, batches)


def _print(measures: list[IBMeasure]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"information bottleneck loss, nats, {measures[0].images} images")
    for column in ("place", "IB", "I(x~;x)", "I(x~;y)", "IBB + H(x)", "IBB_cond"):
        table.add_column(column, justify="left" if column == "place" else "right", no_wrap=True)
    for m in measures:
        figures = (m.ib, m.with_inputs, m.with_labels, m.bound + m.input_entropy, m.bound_conditional)
        table.add_row(m.place, *(f"{v:.4f}" for v in figures))
    Console().print(table)


def _write(path: Path, measures: list[IBMeasure]) -> None:
    import json
    from dataclasses import asdict

    from edge_ibtm.files import write_text

    write_text(path, json.dumps([asdict(m) for m in measures], indent=1) + "\n")

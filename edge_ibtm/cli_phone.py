"""Commands of the phone path: probe, compare, doctor, runner build. Parses, calls, prints; imports nothing
heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

runner_app = typer.Typer(no_args_is_help=True, help="Build the C++ latency runner that probes run on a phone.")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.command("probe")(probe)
    app.command("compare")(compare)
    app.command("doctor")(doctor)
    app.add_typer(runner_app, name="runner")


def probe(
    files: Annotated[list[Path] | None, typer.Argument(help="artifacts; several run round-robin")] = None,
    target: Annotated[str, typer.Option(help="artifact, or torch / cuda with --model")] = "artifact",
    device: Annotated[str, typer.Option(help="host, android[:SERIAL], mac, ios[:NAME]")] = "host",
    model: Annotated[str | None, typer.Option(help="--target torch|cuda: model name")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="--model: merge down to this share")] = None,
    merger: Annotated[str | None, typer.Option(help="--keep-ratio: which merger; default ibtm")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="--model: torch.compile it")] = False,
    inputs: Annotated[Path | None, typer.Option(help=".pt or raw float32 input; default noise")] = None,
    shape: Annotated[str | None, typer.Option(help="input shape, e.g. 1,3,224,224")] = None,
    expected: Annotated[Path | None, typer.Option(help=".pt output to verify against (android)")] = None,
    threads: Annotated[int | None, typer.Option(help="default: every core this process may use")] = None,
    samples: Annotated[int, typer.Option(help="timed runs of each model")] = 100,
    warmup: Annotated[int, typer.Option(help="least number of untimed runs")] = 5,
    seconds: Annotated[float, typer.Option(help="stop sampling a model after this long")] = 60.0,
    profile: Annotated[bool, typer.Option("--profile", help="per-operator times (ETDump)")] = False,
    cores: Annotated[str | None, typer.Option(help="android: all (default), big, little or a list such as 4,5")] = None,
    max_temperature: Annotated[
        float | None, typer.Option(help="android: wait until cooler, Celsius; default 45", show_default=False)
    ] = None,
    runner: Annotated[Path | None, typer.Option(help="android: bundle folder or own executor_runner; ios: .app")] = None,
    import_file: Annotated[
        Path | None, typer.Option("--import", help="minibench JSON, executor_runner or XCTest log to bring in")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="also write the results here")] = None,
) -> None:
    """Latency of artifacts or models: p50, p90, p99 with an interval; the last line is JSON. Exit 1 for wrong outputs."""
    from edge_ibtm import cli_probe

    settings = cli_probe.Settings(
        files=files or [], target=target, device=device, model=model, keep_ratio=keep_ratio, merger=merger,
        compiled=compiled, inputs=inputs, shape=shape, expected=expected, threads=threads, samples=samples,
        warmup=warmup, seconds=seconds, profile=profile, cores=cores, max_temperature=max_temperature,
        runner=runner, import_file=import_file,
    )  # fmt: skip
    run = cli_probe.run(settings)
    cli_probe.show(run, json_path)
    if any(result.parity is not None and not result.parity.ok for result in run.results):
        raise typer.Exit(1)


def compare(
    before: Annotated[Path, typer.Argument(help="results of `edge-ibtm probe`")],
    after: Annotated[Path, typer.Argument(help="results on the same device")],
    tolerance: Annotated[float, typer.Option(help="how much slower AFTER may be: 0.05 is 5 %")] = 0.05,
) -> None:
    """Ratio of the medians with its interval; exit 1 when AFTER is slower beyond the tolerance."""
    from edge_ibtm import compare as comparing

    found = comparing.compare(before, after, tolerance=tolerance)
    typer.echo(comparing.table(found))
    typer.echo(comparing.json_line(found))
    if any(each.regression for each in found):
        raise typer.Exit(1)


def doctor() -> None:
    """Versions and tools: ok, missing, or how to install."""
    from edge_ibtm import doctor as checks

    found = checks.examine()
    typer.echo(checks.table(found))
    typer.echo(checks.json_line(found))
    if any(each.state == "wrong" for each in found):
        raise typer.Exit(1)


@runner_app.command("build")
def runner_build(
    arch: Annotated[str, typer.Option(help="host or aarch64")] = "host",
    out: Annotated[Path | None, typer.Option(help="bundle folder; default in the cache")] = None,
    force: Annotated[bool, typer.Option("--force", help="build again although nothing changed")] = False,
) -> None:
    """Build the runner and pack it with its libraries into one folder; prints what is in it."""
    from edge_ibtm import runner

    bundle = runner.build(arch, out, force=force)
    typer.echo(runner.describe(bundle))
    typer.echo(runner.json_line(bundle))

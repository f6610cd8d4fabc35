"""`edge-ibtm list`: what there is to choose from."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add this module's command to the command line."""
    app.command("list")(list_all)


def list_all() -> None:
    """Models, mergers, targets and recipes."""
    from edge_ibtm.backbones import BACKBONES
    from edge_ibtm.mergers import MERGERS
    from edge_ibtm.recipe import list_recipes
    from edge_ibtm.targets import TARGETS

    typer.echo("models (--model):")
    for family in BACKBONES.values():
        typer.echo(f"  {family.name:<14} {', '.join(family.models)}")
    typer.echo("mergers (--merger):")
    for name, merger in MERGERS.items():
        about = (merger.__doc__ or "").strip().splitlines()
        typer.echo(f"  {name:<14} {about[0] if about else ''}")
    typer.echo("targets (--target):")
    for name, target in TARGETS.items():
        typer.echo(f"  {name:<14} {target.suffix:<12} {target.about}")
    typer.echo("recipes (--recipe):")
    for name in list_recipes():
        typer.echo(f"  {name}")

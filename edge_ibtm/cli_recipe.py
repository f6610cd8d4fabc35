"""`edge-ibtm recipe ls|cat|validate|schema`."""

from __future__ import annotations

from typing import Annotated

import typer

recipe_app = typer.Typer(no_args_is_help=True, help="Look at, check and describe recipes.")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.add_typer(recipe_app, name="recipe")


@recipe_app.command("ls")
def ls() -> None:
    """Recipes that ship with the package, and what each is for."""
    from edge_ibtm.recipe import head, list_recipes

    for name, path in list_recipes().items():
        about = head(path).splitlines()
        typer.echo(f"{name:<34} {about[0] if about else ''}")


@recipe_app.command("cat")
def cat(name: Annotated[str, typer.Argument(help="name of `recipe ls`, or a file")]) -> None:
    """Print a recipe as it stands in its file."""
    from edge_ibtm.recipe import find_recipe, read_text

    typer.echo(read_text(find_recipe(name)), nl=False)


@recipe_app.command("validate")
def validate(
    name: Annotated[str, typer.Argument(help="name of `recipe ls`, or a file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="recipe overrides")] = None,
) -> None:
    """Check a recipe, and that what it names is known; every fault is reported with its path."""
    from edge_ibtm.names import check_names
    from edge_ibtm.recipe import load_recipe

    recipe = load_recipe(name, overrides or [])
    check_names(recipe)
    merge = recipe.merge
    share = f"keep ratio {merge.keep_ratio:g}" if merge.macs is None else f"{merge.macs:g} of the base's MACs"
    typer.echo(f"{name}: valid ({recipe.model.name}, {merge.merger} at {share})")


@recipe_app.command("schema")
def schema() -> None:
    """JSON schema of a recipe."""
    import json

    from edge_ibtm.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))

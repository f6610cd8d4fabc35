"""Find recipe files, read them, and apply `key=value` overrides.

Recipes live in `recipes/` of a checkout and in `edge_ibtm/recipes/` of an installed package (setup.py copies them).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from edge_ibtm.config import Recipe, parse_recipe
from edge_ibtm.errors import UsageError, suggest

_PLACES = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")


def recipe_folder() -> Path:
    """Folder that holds the recipes that ship with the package."""
    for place in _PLACES:
        if place.is_dir():
            return place
    raise UsageError(f"no recipes folder beside the package ({_PLACES[0]}); reinstall edge-ibtm")


def list_recipes() -> dict[str, Path]:
    """Name (path below recipes/ without .yaml) -> file, sorted by name."""
    folder = recipe_folder()
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A file path, or the name of a recipe that ships with the package.

    Errors: UsageError when neither exists.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = list_recipes()
    plain = name.removesuffix(".yaml").removeprefix("recipes/")
    if plain in known:
        return known[plain]
    raise UsageError(f"no recipe file {name!r} and no recipe of that name; {suggest(plain, list(known))}")


def head(path: Path) -> str:
    """The comment lines a recipe begins with: what it is for, what it costs, its command."""
    lines = read_text(path).splitlines()
    kept = []
    for line in lines:
        if not line.startswith("#"):
            break
        kept.append(line.lstrip("# ").rstrip())
    return "\n".join(kept)


def read_text(path: Path) -> str:
    """What a recipe file says. Errors: UsageError when it cannot be read, or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"{path}: cannot be read: {err}") from None


class _OnceEach(yaml.SafeLoader):
    """YAML in which no key stands twice in a mapping: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands here again", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse one YAML file into a mapping. Errors: UsageError with line and column."""
    try:
        values = yaml.load(read_text(path), Loader=_OnceEach)
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise UsageError(f"{path}: not valid YAML at {where}: {getattr(err, 'problem', err)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections, got {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of `values` with `a.b=value` applied; values are read as YAML.

    Of merge.keep_ratio and merge.macs, the one that an override sets takes the place of the one in `values`.
    Errors: UsageError naming every override that is not key=value or runs through a scalar.
    """
    result = give_way(values, [text.partition("=")[0].strip() for text in overrides if not _is_null(text)])
    faults = []
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not all(key.strip().split(".")):
            faults.append(f"override {text!r} is not key=value, e.g. merge.keep_ratio=0.5")
            continue
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        if not _put(result, key.strip().split("."), parsed):
            faults.append(f"override {text!r} goes through a value that is no section")
    if faults:
        raise UsageError("\n  ".join(faults))
    return result


def give_way(values: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A copy of `values` without what setting `keys` replaces: merge.macs by merge.keep_ratio, and conversely."""
    result = _copy(values)
    merge = result.get("merge")
    for given, other in (("keep_ratio", "macs"), ("macs", "keep_ratio")):
        if f"merge.{given}" in keys and isinstance(merge, dict):
            merge.pop(other, None)
    return result


def load_recipe(source: str | Path | None, overrides: list[str] | None = None) -> Recipe:
    """Read, override and validate. source None: the defaults alone."""
    path = find_recipe(str(source)) if source is not None else None
    values = read_yaml(path) if path else {}
    return parse_recipe(apply_overrides(values, overrides or []), str(path) if path else "recipe")


def recipe_for(model: str) -> Path | None:
    """The shipped recipe of a model: the one that carries its name."""
    return list_recipes().get(model)


def _is_null(override: str) -> bool:
    return override.partition("=")[2].strip().lower() in ("", "~", "null")


def _copy(values: Any) -> Any:
    return {k: _copy(v) for k, v in values.items()} if isinstance(values, dict) else values


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> bool:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            return False
    tree[keys[-1]] = value
    return True

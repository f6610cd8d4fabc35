"""Recipes: faults reported together with their path, overrides, files that ship."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from edge_ibtm.config import Recipe, json_schema, parse_recipe
from edge_ibtm.errors import UsageError
from edge_ibtm.recipe import apply_overrides, find_recipe, head, list_recipes, load_recipe


def test_every_fault_is_reported_with_its_path() -> None:
    values = {"merge": {"keep_ratio": 1.5, "mergr": "x"}, "modle": {}, "quantize": {"scheme": "int4"}}
    with pytest.raises(UsageError) as caught:
        parse_recipe(values, "mine.yaml")
    text = str(caught.value)
    assert "4 faults" in text and text.startswith("mine.yaml")
    for part in ("merge.keep_ratio", "1.5", "did you mean 'merger'", "did you mean 'model'", "quantize.scheme"):
        assert part in text


@pytest.mark.parametrize("ratio", [0, -0.1, 1.0001, float("nan"), "abc", None])
def test_keep_ratio_outside_zero_to_one_is_refused(ratio: object) -> None:
    with pytest.raises(UsageError, match=r"merge\.keep_ratio"):
        parse_recipe({"merge": {"keep_ratio": ratio}})


def test_keep_ratio_one_is_allowed() -> None:
    assert parse_recipe({"merge": {"keep_ratio": 1}}).merge.keep_ratio == 1


def test_a_base_of_random_weights_is_refused() -> None:
    with pytest.raises(UsageError, match=r"base\.epochs"):
        parse_recipe({"base": {"epochs": 0}})
    assert parse_recipe({"base": {"epochs": 0}, "model": {"weights": "x.pth"}}).base.epochs == 0


def test_targets_as_text_or_list() -> None:
    for value in ("xnnpack, coreml", ["xnnpack", "coreml", "xnnpack"]):
        assert parse_recipe({"lower": {"targets": value}}).lower.targets == ("xnnpack", "coreml")
    with pytest.raises(UsageError, match="at least one"):
        parse_recipe({"lower": {"targets": []}})


def test_overrides_are_typed_and_leave_the_original_alone() -> None:
    original = {"merge": {"keep_ratio": 0.7}}
    changed = apply_overrides(original, ["merge.keep_ratio=0.5", "finetune.lr=1e-4", "data.augment.hflip=0"])
    assert original == {"merge": {"keep_ratio": 0.7}}
    recipe = parse_recipe(changed)
    assert (recipe.merge.keep_ratio, recipe.finetune.lr, recipe.data.augment.hflip) == (0.5, 1e-4, 0.0)


def test_bad_overrides_are_reported_together() -> None:
    with pytest.raises(UsageError) as caught:
        apply_overrides({"seed": 1}, ["nonsense", "seed.x=1", "=3"])
    assert str(caught.value).count("override") == 3


def test_yaml_faults_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("model:\n  name: [mobilevit_s\n")
    with pytest.raises(UsageError, match="line 3"):
        load_recipe(file)
    file.write_text("merge: {keep_ratio: 0.5}\nseed: 3\nmerge: {merger: tome}\n")
    with pytest.raises(UsageError, match="line 3, column 1: 'merge' stands here again"):
        load_recipe(file)
    file.write_text("? [a, b]\n: 1\n")
    with pytest.raises(UsageError, match="line 1, column 3: found unhashable key"):
        load_recipe(file)
    file.write_bytes(b"\xff\xfe")
    for reader in (load_recipe, head):
        with pytest.raises(UsageError, match="cannot be read"):
            reader(file)
    file.write_text("- 1\n")
    with pytest.raises(UsageError, match="mapping"):
        load_recipe(file)


def test_unknown_recipe_suggests() -> None:
    with pytest.raises(UsageError, match="did you mean 'mobilevit_s'"):
        find_recipe("mobilevits")


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_shipped_recipes_are_valid_and_introduce_themselves(name: str) -> None:
    path = list_recipes()[name]
    recipe = load_recipe(name)
    assert recipe.model.name in path.read_text()
    assert "edge-ibtm" in head(path), "the head gives the exact command"
    assert len(head(path).splitlines()) >= 3


def test_schema_describes_every_section() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False


def test_a_recipe_survives_its_own_yaml() -> None:
    recipe = load_recipe("mobilevit_s")
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


def test_keep_ratio_or_macs_not_both() -> None:
    with pytest.raises(UsageError, match=r"merge\.macs is 0\.8 and merge\.keep_ratio is 0\.5.*give one"):
        parse_recipe({"merge": {"keep_ratio": 0.5, "macs": 0.8}})
    assert parse_recipe({"merge": {"keep_ratio": 0.5, "macs": None}}).merge.keep_ratio == 0.5
    with pytest.raises(UsageError, match=r"merge\.macs is 0\.8"):
        load_recipe("smoke", ["merge.keep_ratio=0.5", "merge.macs=0.8"])


def test_an_override_takes_the_place_of_the_other_knob(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for written, override, (keep_ratio, macs) in (
        ("keep_ratio: 0.5", "merge.macs=0.8", (0.7, 0.8)),
        ("macs: 0.8", "merge.keep_ratio=0.5", (0.5, None)),
        ("keep_ratio: 0.5", "merge.macs=null", (0.5, None)),
    ):
        file.write_text(f"merge: {{{written}}}\n")
        merge = load_recipe(file, [override]).merge
        assert (merge.keep_ratio, merge.macs) == (keep_ratio, macs)

"""What the README promises: its commands exist as they stand, its code runs, its tree is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from edge_ibtm.cli import app
from edge_ibtm.report import MARKS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```sh\n(.*?)^```$", README, re.S | re.M)
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.S | re.M)


def commands() -> list[list[str]]:
    """Every edge-ibtm command of the README, without comments, as words after the program's name."""
    found = []
    for line in "\n".join(SHELL).splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words and words[0].endswith("edge-ibtm"):
                found.append(words[1:])
    return found


def test_code_comes_within_the_first_hundred_words() -> None:
    assert len(README.split("```sh")[0].split()) < 100
    head = README.split("```", 4)
    assert "compress --model mobilevit_s" in head[1] and "pytest" in head[3] and head[2].strip() == ""


def test_ci_runs_the_second_command_as_it_stands() -> None:
    assert "block == 2" in (ROOT / ".ci" / "run").read_text() and "[dev]" in SHELL[1]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_and_options_exist(words: list[str]) -> None:
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    assert not hasattr(command, "commands"), f"no such command: {words}"
    known = {o for p in command.params for o in p.opts}
    assert {w.split("=")[0] for w in words if w.startswith("--")} <= known
    for word in words:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file()


def test_python_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert PYTHON
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    share = float(re.search(r"([\d.]+) of the MACs", out).group(1))  # type: ignore[union-attr]
    assert share < 1 and float(re.search(r"SQNR (\d+)", out).group(1)) >= 80  # type: ignore[union-attr]


def test_tree_names_what_exists() -> None:
    tree = re.search(r"## Folders\n\n```\n(.*?)```", README, re.S).group(1)  # type: ignore[union-attr]
    for line in tree.splitlines():
        inside, names = line.startswith("  "), re.match(r"\s*((?:[\w*./]+ )+)", line + " ")
        for name in names.group(1).split() if names else []:
            if "." in name or name.endswith("/"):
                assert list((ROOT / "edge_ibtm" if inside else ROOT).glob(name.rstrip("/"))), name


def test_demo_table_has_its_place() -> None:
    assert README.index(MARKS[0]) < README.index(MARKS[1])

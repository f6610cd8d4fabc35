"""Stage results on disk, found again by a hash of everything they depend on.

    <run>/stages/<stage>-<key>/            a finished stage: its files and entry.json
    <run>/stages/<stage>-<key>.partial/    an unfinished one; the stage resumes from what it left there

A stage's key covers its part of the recipe, the content of the entries it reads, the source of the modules that compute
it and the versions of the libraries they stand on. A finished folder appears by renaming, so it is whole or absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edge_ibtm.errors import UsageError
from edge_ibtm.files import sha256_of, write_text

LIBRARIES = ("torch", "torchvision", "timm", "executorch", "torchao", "coremltools")
_ENTRY = "entry.json"


@dataclass(frozen=True)
class Entry:
    """A finished stage. record: JSON figures; digest: SHA-256 of its files' content and its record."""

    stage: str
    key: str
    path: Path
    record: dict[str, Any]
    digest: str

    def file(self, name: str) -> Path:
        """A file of this entry."""
        return self.path / name


@dataclass(frozen=True)
class Stage:
    """What a stage is called and what its result depends on: JSON inputs and module names of this package."""

    name: str
    inputs: dict[str, Any]
    modules: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Twelve hex digits that change with anything the stage depends on."""
        parts = {
            "stage": self.name,
            "inputs": self.inputs,
            "source": source_hash(self.modules),
            "libraries": library_versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


class Cache:
    """The stages folder of one run directory."""

    def __init__(self, run: Path) -> None:
        self.root = run / "stages"

    def folder(self, stage: Stage) -> Path:
        """Where the finished entry of a stage is, or will be."""
        return self.root / f"{stage.name}-{stage.key}"

    def find(self, stage: Stage) -> Entry | None:
        """The finished entry, None when it is missing or its files are damaged."""
        return read_entry(self.folder(stage))

    def why_not(self, stage: Stage) -> str:
        """Why a stage has to run: the reason that is printed."""
        folder = self.folder(stage)
        if folder.exists():
            return "its cached files are damaged"
        if partial_of(folder).exists():
            return "resuming what was left unfinished"
        others = list(self.root.glob(f"{stage.name}-*")) if self.root.exists() else []
        return "its inputs changed" if others else "first run"

    def make(self, stage: Stage, work: Callable[[Path], dict[str, Any]]) -> Entry:
        """Run `work(folder) -> record` in the partial folder and publish it by renaming.

        What `work` leaves under `scratch/` is for resuming and is removed when the stage is complete.
        """
        final = self.folder(stage)
        partial = partial_of(final)
        partial.mkdir(parents=True, exist_ok=True)
        record = work(partial)
        shutil.rmtree(partial / "scratch", ignore_errors=True)
        write_entry(stage, partial, record)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        entry = read_entry(final)
        assert entry is not None
        return entry


def partial_of(folder: Path) -> Path:
    """The folder of an unfinished stage."""
    return folder.with_name(folder.name + ".partial")


def write_entry(stage: Stage, folder: Path, record: dict[str, Any]) -> None:
    """Write entry.json: the record and the hash of every file."""
    files = {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(_ENTRY, None)
    body = {"stage": stage.name, "key": stage.key, "inputs": stage.inputs, "record": record, "files": files}
    write_text(folder / _ENTRY, json.dumps(body, indent=1, default=str))


def read_entry(folder: Path) -> Entry | None:
    """The entry in a folder; None unless entry.json is there and every file has its recorded hash."""
    try:
        body = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
        whole = all(sha256_of(folder / name) == known for name, known in body["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    if not whole:
        return None
    content = json.dumps([body["record"], body["files"]], sort_keys=True)
    return Entry(body["stage"], body["key"], folder, body["record"], hashlib.sha256(content.encode()).hexdigest())


def weights_hash(weights: str | None) -> str | None:
    """What weights hold: the hash of their file, or what names them when they are no file (`pretrained`)."""
    path = Path(weights).expanduser() if weights and weights != "pretrained" else None
    return sha256_of(path) if path is not None and path.is_file() else weights


@cache
def source_hash(modules: tuple[str, ...]) -> str:
    """Hash of the source of modules ('tokens', 'finetune*') or subpackages ('targets') of this package."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for name in sorted(modules):
        place = root / name
        files = sorted(place.rglob("*.py")) if place.is_dir() else sorted(root.glob(f"{name}.py"))
        for file in files:
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def library_versions() -> str:
    """Versions of the libraries that decide what a stage computes."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name}={version(name)}")
        except PackageNotFoundError:
            found.append(f"{name}=missing")
    return " ".join(found)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run directory alone. Errors: UsageError when another process works in it."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run is at work in {run}; wait for it, or choose another --out") from None
        yield

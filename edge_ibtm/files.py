"""Files that are whole or absent, and what they hold."""

from __future__ import annotations

import glob
import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_ibtm.errors import UsageError

MANIFEST = "Manifest.json"  # of a Core ML package; its identifiers are drawn anew each time


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, with its suffix: renamed to `path` when the block ends well, else removed.

    What killed processes left of earlier attempts goes. Errors: UsageError when `path` is a folder.
    """
    refuse_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*.part.{glob.escape(path.name)}"):
        if not _runs(left.name.split(".")[1]):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether a process of this number runs here, or what is given is no number."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass  # no number; or another user's process
    return True


def refuse_folder(path: Path) -> None:
    """UsageError when `path`, where a file is to be written, is a folder."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file to write, such as {path / 'model'}")


def refuse_file(folder: Path) -> None:
    """UsageError when `folder`, where results are to go, or something above it is a file."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not place.is_dir():
        raise UsageError(f"--out {folder}: {place} is a file; give the name of a folder")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as name:
        name.write_text(text, encoding="utf-8")


def save_tensors(value: Any, file: Any) -> None:
    """torch.save to a file or its path. An interrupt stays one: the writer then ends its file, which fails and hides it."""
    import torch

    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file; of a folder, over the names and contents of its files but a package's manifest."""
    if not path.is_dir():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\0".encode())
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def check_pte(path: str | Path) -> Path:
    """The path of what is a whole ExecuTorch program by its header (magic ET12, sizes in the `eh00` header).

    Errors: UsageError when the file is missing, foreign or cut short.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"no such file: {file}; `edge-ibtm lower` or `compress` writes a .pte")
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(64)
    if head[4:6] != b"ET":
        raise UsageError(f"{file} ({size} bytes) is not an ExecuTorch program: no ET magic; give a .pte file")
    whole = 64
    if head[8:12] == b"eh00" and len(head) >= 40:
        length, program, segments, data = struct.unpack_from("<IQQQ", head + bytes(16), 12)
        whole = max(program, segments + (data if length >= 32 else 0))
    if size < whole:
        raise UsageError(f"{file} is cut short: {size} of {whole} bytes; copy or lower it again")
    return file

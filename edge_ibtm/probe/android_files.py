"""Files on the phone, named by their checksum: what is already there is not sent again, and all of it is
taken away.

Names on the phone are hexadecimal, so nothing in a model's own name can reach the phone's shell.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from edge_ibtm import runner
from edge_ibtm.errors import DeviceError
from edge_ibtm.files import sha256_of
from edge_ibtm.probe.adb import Adb
from edge_ibtm.probe.phone import free_mb

_MARGIN_MB = 50.0


@dataclass
class Store:
    """The folder `root` on the phone. `held` collects what this probe put or found there, for `clean`."""

    adb: Adb
    root: str
    held: list[str] = field(default_factory=list)
    pushed: int = 0

    def open(self) -> None:
        """Make the folder; DeviceError when the phone does not allow it."""
        self.adb.shell(f"mkdir -p {shlex.quote(self.root)}")

    def place(self, files: list[Path]) -> list[str]:
        """Have each file on the phone, whole; their remote paths. Sends only what is not there."""
        names = [f"{sha256_of(file)[:24]}{_suffix(file)}" for file in files]
        self._send({self._remote(name): file for name, file in zip(names, files, strict=True)})
        return [self._remote(name) for name in names]

    def place_bundle(self, bundle: runner.Bundle) -> str:
        """Have the runner on the phone; the remote path of its start script."""
        folder = self._remote(f"runner-{bundle.source_sha256[:12]}")
        self.held.append(folder)
        self.adb.shell(f"mkdir -p {shlex.quote(folder)}")
        self._send({f"{folder}/{name}": bundle.folder / name for name in bundle.files})
        programs = [n for n in ("run.sh", runner.PROGRAM, runner.LOADER) if n in bundle.files]
        self.adb.shell("chmod 755 " + " ".join(shlex.quote(f"{folder}/{name}") for name in programs))
        return f"{folder}/run.sh"

    def _remote(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _send(self, wanted: dict[str, Path]) -> None:
        self.held += wanted
        there = self._checksums(list(wanted))
        missing = {remote: local for remote, local in wanted.items() if there.get(remote) != sha256_of(local)}
        need = sum(local.stat().st_size for local in missing.values()) / 1e6
        if need and (free := free_mb(self.adb, self.root)) < need + _MARGIN_MB:
            raise DeviceError(
                f"the phone has {free:.0f} MB free, {need + _MARGIN_MB:.0f} MB are needed in {self.root}; free some storage"
            )
        for remote, local in missing.items():
            self.adb.push(local, remote)
            self.pushed += 1
        after = self._checksums(list(missing))
        damaged = [
            local.name for remote, local in missing.items() if remote in after and after[remote] != sha256_of(local)
        ]
        if damaged:
            raise DeviceError(f"{', '.join(damaged)} arrived damaged on the phone; its storage may be full or failing")

    def _checksums(self, remotes: list[str]) -> dict[str, str]:
        """SHA-256 of those that exist; empty on a phone without sha256sum (before Android 8)."""
        if not remotes:
            return {}
        names = " ".join(shlex.quote(remote.removeprefix(self.root + "/")) for remote in remotes)
        found = self.adb.shell(f"cd {shlex.quote(self.root)} && sha256sum {names} 2>/dev/null", check=False)
        rows = re.findall(r"^([0-9a-f]{64})\s+\*?(.+)$", found, re.MULTILINE)
        return {self._remote(name): digest for digest, name in rows}

    def clean(self, keep: bool, extra: list[str]) -> None:
        """Remove `extra`, and everything held unless `keep`; the folder itself when it is empty."""
        going = extra + ([] if keep else self.held)
        if going:
            self.adb.shell("rm -rf " + " ".join(shlex.quote(each) for each in going))
        self.adb.shell(f"rmdir {shlex.quote(self.root)} 2>/dev/null", check=False)


def _suffix(file: Path) -> str:
    return file.suffix if file.suffix in (".pte", ".bin") else ".dat"

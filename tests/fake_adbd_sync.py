"""The loopback phone's file transfer: adb sync STAT, LIST, SEND and RECV, and the faults that happen while
files travel.

Protocol: https://android.googlesource.com/platform/packages/modules/adb/+/refs/heads/main/SYNC.TXT
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any


class Sync:
    """One session of the file transfer service. stream: `read(count)` and `write(data)`; phone: a FakePhone."""

    def __init__(self, stream: Any, phone: Any) -> None:
        self.stream, self.phone = stream, phone

    def serve(self) -> None:
        while True:
            name, length = struct.unpack("<4sI", self.stream.read(8))
            if name == b"QUIT":
                return
            argument = self.stream.read(length).decode()
            handler = {b"STAT": self._stat, b"STA2": self._stat2, b"LST2": self._stat2, b"LIST": self._list,
                       b"SEND": self._send, b"RECV": self._recv}.get(name)  # fmt: skip
            if handler is None:
                self._fail(f"unknown request {name!r}")
                return
            if handler in (self._stat2,):
                self._stat2(argument, name)
            else:
                handler(argument)

    def _fail(self, message: str) -> None:
        self.stream.write(b"FAIL" + struct.pack("<I", len(message.encode())) + message.encode())

    def _stat(self, path: str) -> None:
        try:
            found = os.lstat(self.phone.local(path))
            values = (found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime))
        except OSError:
            values = (0, 0, 0)
        self.stream.write(b"STAT" + struct.pack("<3I", *values))

    def _stat2(self, path: str, name: bytes = b"STA2") -> None:
        try:
            f = (os.stat if name == b"STA2" else os.lstat)(self.phone.local(path))
            times = (int(f.st_atime), int(f.st_mtime), int(f.st_ctime))
            values = (0, f.st_dev, f.st_ino, f.st_mode, f.st_nlink, f.st_uid, f.st_gid, f.st_size, *times)
        except OSError as error:
            values = (error.errno or 2, *[0] * 10)
        self.stream.write(name + struct.pack("<IQQIIIIQqqq", *values))

    def _list(self, path: str) -> None:
        folder = self.phone.local(path)
        for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            f, name = os.lstat(os.path.join(folder, entry)), entry.encode()
            fields = struct.pack("<4I", f.st_mode, f.st_size & 0xFFFFFFFF, int(f.st_mtime), len(name))
            self.stream.write(b"DENT" + fields + name)
        self.stream.write(b"DONE" + bytes(16))

    def _send(self, argument: str) -> None:
        path, _, mode = argument.rpartition(",")
        faults = self.phone.faults
        if faults.cut_after_files == 0:
            faults.cut_after_files = -1
            self.stream.read(8)
            self.phone.cut(faults.away_seconds)
            raise EOFError
        faults.cut_after_files -= 1 if faults.cut_after_files > 0 else 0
        target = Path(self.phone.local(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(os.devnull if faults.full else target, "wb") as out:
            while True:
                name, length = struct.unpack("<4sI", self.stream.read(8))
                if name == b"DONE":
                    break
                out.write(self.stream.read(length))
        if faults.full:
            self._fail("couldn't write: No space left on device")
            return
        if target.name.startswith("job.sh"):
            target.write_text(self.phone.shell_text(target.read_text()))
        target.chmod(stat.S_IMODE(int(mode)) | 0o600)
        self.phone.pushed.append(path)
        self.stream.write(b"OKAY" + bytes(4))

    def _recv(self, path: str) -> None:
        try:
            with open(self.phone.local(path), "rb") as source:
                while data := source.read(65536):
                    self.stream.write(b"DATA" + struct.pack("<I", len(data)) + data)
            self.stream.write(b"DONE" + bytes(4))
        except OSError as error:
            self._fail(error.strerror or "error")

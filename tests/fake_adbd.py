"""A loopback phone for tests: the device side of the adb protocol, with faults that can be switched on.

It speaks CNXN, OPEN, OKAY, WRTE and CLSE, shell with and without the v2 framing, and sync STAT, LIST, SEND
and RECV, which is what `adb push`, `pull` and `shell` use. Commands run in this machine's /bin/sh. Absolute
paths of the phone (/data/local/tmp, /sys) live under `root`, in commands and in the job script that is
pushed, and `getprop`, `dumpsys`, `df` and `nproc` are small scripts in `root/bin`. Protocol:
https://android.googlesource.com/platform/packages/modules/adb/+/refs/heads/main/protocol.txt
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fake_adbd_sync import Sync

CNXN, OPEN, OKAY, WRTE, CLSE, AUTH = (
    int.from_bytes(word, "little") for word in (b"CNXN", b"OPEN", b"OKAY", b"WRTE", b"CLSE", b"AUTH")
)
PUBLIC_KEY = 3
MAX_PAYLOAD = 256 * 1024
ROOTED = ("/data/local/tmp", "/sys/")


@dataclass
class Faults:
    """What goes wrong. Each is read when it matters, so that a test may switch it while the phone runs."""

    unauthorized: bool = False
    silent: bool = False
    full: bool = False
    refuse: bool = False
    cut_after_files: int = -1
    away_seconds: float = 0.0
    on_shell: Callable[[str], None] | None = None


@dataclass
class FakePhone:
    """One phone on 127.0.0.1. `serial` is what adb calls it after `adb connect`."""

    root: Path
    abi: str = "arm64-v8a"
    model: str = "Loopback One"
    faults: Faults = field(default_factory=Faults)
    shell_v2: bool = True
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pushed: list[str] = []
        self.connections: list[_Connection] = []
        self._make_root()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.serial = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _make_root(self) -> None:
        (self.root / "data/local/tmp").mkdir(parents=True)
        self.command(
            "getprop",
            f'case "$1" in ro.product.manufacturer) echo Acme;; ro.product.model) echo "{self.model}";; '
            f"ro.product.cpu.abi*) echo {self.abi};; ro.build.version.release) echo 14;; "
            "ro.build.version.sdk) echo 34;; esac",
        )
        self.command("dumpsys", 'cat "$(dirname "$0")/../dumpsys-$1"')
        self.command("df", 'echo "Filesystem 1K-blocks Used Available Use% Mounted on"; cat "$(dirname "$0")/../df"')
        (self.root / "df").write_text("/dev/block/dm-5 100000000 1000 90000000 1% /data\n")
        self.battery(temperature=28.5)
        self.thermal_status(0)
        for cpu, khz in enumerate((1800000, 2800000)):
            folder = self.root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
            folder.mkdir(parents=True)
            (folder / "cpuinfo_max_freq").write_text(f"{khz}\n")
        zone = self.root / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True)
        (zone / "type").write_text("skin-therm\n")
        (zone / "temp").write_text("31000\n")

    def command(self, name: str, script: str) -> None:
        """Put a command in front of the phone's PATH."""
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def battery(self, temperature: float, level: int = 80) -> None:
        text = f"Current Battery Service state:\n  USB powered: true\n  level: {level}\n  temperature: {temperature * 10:.0f}\n"
        (self.root / "dumpsys-battery").write_text(text)

    def thermal_status(self, status: int) -> None:
        (self.root / "dumpsys-thermalservice").write_text(f"IsStatusOverride: false\nThermal Status: {status}\n")

    def left_behind(self) -> list[str]:
        """Everything on the phone that it did not have when it was new."""
        tmp = self.root / "data/local/tmp"
        return sorted(str(path.relative_to(tmp)) for path in tmp.rglob("*"))

    def cut(self, seconds: float) -> None:
        """Pull the cable for a while: every connection ends, none is accepted until then."""
        self.faults.refuse = True
        for connection in list(self.connections):
            connection.drop()
        threading.Timer(seconds, lambda: setattr(self.faults, "refuse", False)).start()

    def close(self) -> None:
        """Unplug it for good."""
        self.faults.refuse = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in list(self.connections):
            connection.drop()

    def local(self, remote: str) -> str:
        """Where a path of the phone lives on this machine."""
        for prefix in ROOTED:
            if remote.startswith(prefix):
                return str(self.root) + remote
        return remote

    def shell_text(self, script: str) -> str:
        for prefix in ROOTED:
            script = script.replace(prefix, f"{self.root}{prefix}")
        return script

    def shell_environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment, "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"}

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            if self.faults.refuse:
                sock.close()
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(sock, self)
            self.connections.append(connection)
            threading.Thread(target=connection.loop, daemon=True).start()


class _Connection:
    """One adb server's connection, carrying many streams."""

    def __init__(self, sock: socket.socket, phone: FakePhone) -> None:
        self.sock, self.phone = sock, phone
        self.lock = threading.Lock()
        self.streams: dict[int, _Stream] = {}
        self.opened = 0
        self.max_payload = 4096

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        if self in self.phone.connections:
            self.phone.connections.remove(self)

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        head = struct.pack("<6I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF)
        with self.lock:
            self.sock.sendall(head + data)

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def loop(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                command, first, second, length, _, _ = struct.unpack("<6I", self._receive(24))
                self._message(command, first, second, self._receive(length))
        for stream in list(self.streams.values()):
            stream.end()

    def _message(self, command: int, first: int, second: int, data: bytes) -> None:
        if command == CNXN:
            self._greet(second)
        elif command == AUTH and first != PUBLIC_KEY:
            self.send(AUTH, 1, 0, bytes(20))
        elif command == OPEN:
            self.opened += 1
            stream = _Stream(self, self.opened, first)
            self.streams[self.opened] = stream
            threading.Thread(target=stream.serve, args=(data.rstrip(b"\0").decode(),), daemon=True).start()
        elif command == WRTE and second in self.streams:
            self.streams[second].feed(data)
        elif command == OKAY and second in self.streams:
            self.streams[second].acknowledged.release()
        elif command == CLSE and second in self.streams:
            self.streams[second].end()

    def _greet(self, max_payload: int) -> None:
        if self.phone.faults.silent:
            return
        if self.phone.faults.unauthorized:
            self.send(AUTH, 1, 0, bytes(20))
            return
        self.max_payload = min(max_payload, MAX_PAYLOAD)
        features = "shell_v2,cmd,stat_v2" if self.phone.shell_v2 else "cmd"
        banner = f"device::ro.product.model={self.phone.model};features={features}"
        self.send(CNXN, 0x01000001, MAX_PAYLOAD, banner.encode())


class _Stream:
    """One service: a shell command or a file transfer."""

    def __init__(self, connection: _Connection, local: int, remote: int) -> None:
        self.connection, self.local, self.remote = connection, local, remote
        self.buffer = bytearray()
        self.changed = threading.Condition()
        self.ended = False
        self.acknowledged = threading.Semaphore(0)

    def feed(self, data: bytes) -> None:
        with self.changed:
            self.buffer += data
            self.changed.notify_all()
        self.connection.send(OKAY, self.local, self.remote)

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()
        self.acknowledged.release()

    def read(self, count: int) -> bytes:
        with self.changed:
            self.changed.wait_for(lambda: len(self.buffer) >= count or self.ended)
            if len(self.buffer) < count:
                raise EOFError
            data = bytes(self.buffer[:count])
            del self.buffer[:count]
            return data

    def write(self, data: bytes) -> None:
        step = self.connection.max_payload
        for start in range(0, len(data), step):
            if self.ended:
                raise EOFError
            self.connection.send(WRTE, self.local, self.remote, data[start : start + step])
            self.acknowledged.acquire()

    def serve(self, service: str) -> None:
        with contextlib.suppress(EOFError, OSError):
            if service.startswith("sync:"):
                self.connection.send(OKAY, self.local, self.remote)
                Sync(self, self.connection.phone).serve()
            elif service.startswith(("shell,", "shell:")):
                self.connection.send(OKAY, self.local, self.remote)
                self._shell(service)
            self.connection.send(CLSE, self.local, self.remote)
        self.connection.streams.pop(self.local, None)

    def _shell(self, service: str) -> None:
        kind, _, script = service.partition(":")
        framed = "v2" in kind.split(",")
        phone = self.connection.phone
        if phone.faults.on_shell:
            phone.faults.on_shell(script)
        process = subprocess.Popen(
            ["/bin/sh", "-c", phone.shell_text(script)], cwd=phone.root, env=phone.shell_environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if framed else subprocess.STDOUT,
        )  # fmt: skip
        lock = threading.Lock()
        pipes = [(process.stdout, 1)] + ([(process.stderr, 2)] if framed else [])
        pumps = [threading.Thread(target=self._pump, args=(pipe, number, framed, lock)) for pipe, number in pipes]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        code = process.wait()
        if framed:
            self.write(struct.pack("<BIB", 3, 1, code & 255))

    def _pump(self, pipe: IO[bytes], number: int, framed: bool, lock: threading.Lock) -> None:
        while data := os.read(pipe.fileno(), 32768):
            with lock, contextlib.suppress(EOFError, OSError):
                self.write(struct.pack("<BI", number, len(data)) + data if framed else data)


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Until something is so; AssertionError when it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def kill_runner(phone: FakePhone, times: int) -> list[int]:
    """Kill the runner on the phone as Android does when memory is short, each time after some rounds."""
    killed: list[int] = []

    def watch(script: str) -> None:
        if "kill -0" not in script or len(killed) >= times:
            return
        for folder in (phone.root / "data/local/tmp/edge-ibtm").glob("run-*"):
            progress, pid = folder / "progress.txt", folder / "pid"
            if pid.exists() and not (folder / "rc").exists():
                wait_for(lambda file=progress: file.exists() and file.stat().st_size > 0)
                killed.append(int(pid.read_text()))
                os.kill(killed[-1], signal.SIGKILL)

    phone.faults.on_shell = watch
    return killed

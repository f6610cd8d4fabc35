"""One phone through the `adb` program: commands, files, and what each way of losing the phone means.

`adb` is Google's own tool, from $ADB, the PATH, or the copy that the `adbutils` package brings. Every command
that is sent ends by printing its exit code behind a marker: a command whose marker did not come back did not
finish, whatever adb's own exit code says, on old and new devices alike.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from edge_ibtm.errors import DeviceError, UsageError

T = TypeVar("T")
_MARK = "edge-ibtm-exit="
_LOST = re.compile(
    r"device offline|device '[^']*' not found|device not found|no devices|device still (connecting|authorizing)|"
    r"closed|[Cc]onnection reset|protocol fault|couldn't read|failed to read|EOF|no response|failed to get feature set",
)


class ConnectionLost(DeviceError):
    """The phone went away in the middle; the operation may be tried again."""


@dataclass(frozen=True)
class Adb:
    """A phone: `serial`, and how patient to be when its cable is pulled.

    reconnect_seconds: how long to wait for it to come back; attempts: how often an operation is tried.
    """

    serial: str
    program: str
    reconnect_seconds: float = 60.0
    attempts: int = 3
    timeout: float = 600.0

    def shell(self, script: str, *, check: bool = True, timeout: float | None = None) -> str:
        """Run a shell script on the phone and return its stdout. Quote what goes into it with `shlex.quote`.

        Errors: ConnectionLost after the last attempt; DeviceError when `check` and its exit code is not 0.
        """
        code, out, err = self.retry(lambda: self._shell_once(script, timeout))
        if check and code != 0:
            said = (err.strip() or out.strip() or "no message").splitlines()[-1]
            raise _refusal(f"the phone answered {code} to `{_short(script)}`: {said}", said)
        return out

    def status(self, script: str) -> tuple[int, str]:
        """Exit code and stdout of a shell script."""
        code, out, _ = self.retry(lambda: self._shell_once(script, None))
        return code, out

    def push(self, local: Path, remote: str) -> None:
        """Copy a file to the phone under a temporary name and move it into place when it is whole."""
        part, whole = shlex.quote(remote + ".part"), shlex.quote(remote)
        self.retry(lambda: self._transfer("push", str(local), remote + ".part"))
        self.shell(f"if [ -e {part} ]; then mv {part} {whole}; else [ -e {whole} ]; fi")

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file from the phone."""
        self.retry(lambda: self._transfer("pull", remote, str(local)))

    def retry(self, operation: Callable[[], T]) -> T:
        """Do it again after the phone came back, up to `attempts` times."""
        for attempt in range(1, self.attempts + 1):
            try:
                return operation()
            except ConnectionLost as lost:
                if attempt == self.attempts:
                    raise ConnectionLost(f"{lost} (tried {attempt} times); check the cable and `adb devices`") from None
                self.wait()
        raise AssertionError("attempts is at least 1")

    def wait(self) -> None:
        """Until the phone answers again; ConnectionLost when it does not within `reconnect_seconds`."""
        deadline = time.monotonic() + self.reconnect_seconds
        once = replace(self, attempts=1)
        while True:
            if ":" in self.serial:
                self._adb(["connect", self.serial], timeout=10, of_device=False)
            try:
                once._shell_once("true", 10)
                return
            except DeviceError as error:
                if time.monotonic() > deadline:
                    waited = f"{self.reconnect_seconds:.0f} s"
                    raise ConnectionLost(f"{self.serial} did not come back within {waited}: {error}") from None
            time.sleep(min(1.0, self.reconnect_seconds / 10))

    def _shell_once(self, script: str, timeout: float | None) -> tuple[int, str, str]:
        done = self._adb(["shell", f"({script}\n); echo {_MARK}$?"], timeout=timeout or self.timeout)
        out, mark, code = done.stdout.replace("\r\n", "\n").rpartition(_MARK)
        if not mark or not code.strip().isdigit():
            raise self._lost(done.stderr or done.stdout, f"`{_short(script)}`")
        return int(code), out, done.stderr

    def _transfer(self, verb: str, source: str, target: str) -> None:
        done = self._adb([verb, source, target], timeout=self.timeout)
        if done.returncode == 0:
            return
        said = (done.stderr + done.stdout).strip()
        telling = [line for line in said.splitlines() if "error" in line or "failed" in line] or said.splitlines()
        last = telling[-1] if telling else f"exit code {done.returncode}"
        if _LOST.search(said.replace(source, "")):  # a path may hold the same words
            raise self._lost(said, f"{verb} {Path(source).name}")
        raise _refusal(f"adb {verb} of {Path(source).name} failed: {last}", said)

    def _lost(self, said: str, doing: str) -> DeviceError:
        """What became of the phone, from adb's words."""
        text = said.strip().splitlines()[-1] if said.strip() else "the connection ended"
        if "unauthorized" in text:
            return DeviceError(_advice(self.serial, "unauthorized"))
        state = "offline" if "offline" in text else "gone"
        return ConnectionLost(f"the phone {self.serial} went {state} during {doing}: {text}")

    def _adb(self, words: list[str], *, timeout: float, of_device: bool = True) -> subprocess.CompletedProcess[str]:
        target = ["-s", self.serial] if of_device else []
        try:
            return subprocess.run(
                [self.program, *target, *words],
                capture_output=True, text=True, errors="replace", timeout=timeout, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ConnectionLost(f"{self.serial} did not answer within {timeout:.0f} s to adb {words[0]}") from None


def find_adb() -> str:
    """Path of the adb program; DeviceError that says how to get it."""
    for candidate in (os.environ.get("ADB"), shutil.which("adb")):
        if candidate and shutil.which(candidate):
            return candidate
    try:
        from adbutils import adb_path

        return str(adb_path())
    except (ImportError, OSError):
        raise DeviceError("adb is missing: apt install adb, or pip install 'edge-ibtm[android]'") from None


def list_devices(program: str) -> dict[str, str]:
    """Serial -> state (device, offline, unauthorized...) of every phone that adb sees."""
    try:
        done = subprocess.run([program, "devices"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"{program} devices failed: {error}; try `adb kill-server`") from None
    if done.returncode != 0:
        raise DeviceError(f"{program} devices failed: {done.stderr.strip()}; try `adb kill-server`")
    rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    return {row[0]: row[1].strip() for row in rows}


def choose_device(serial: str | None, *, reconnect_seconds: float = 60.0) -> Adb:
    """The phone with `serial`, or the only one there is.

    Errors: DeviceError (none, offline, unauthorized, no such serial), UsageError (several and no serial).
    """
    program = find_adb()
    found = list_devices(program)
    if serial is None:
        if not found:
            raise DeviceError("no phone: connect one, switch on USB debugging, and see that `adb devices` lists it")
        if len(found) > 1:
            names = ", ".join(f"{name} ({state})" for name, state in found.items())
            raise UsageError(f"{len(found)} phones: {names}; choose one with --device android:SERIAL")
        (serial,) = found
    if serial not in found:
        known = ", ".join(found) or "none"
        raise DeviceError(f"no phone {serial!r}; adb sees: {known}; check the cable and `adb devices`")
    if found[serial] != "device":
        raise DeviceError(_advice(serial, found[serial]))
    return Adb(serial, program, reconnect_seconds)


def _advice(serial: str, state: str) -> str:
    advice = {
        "unauthorized": "unlock it and allow USB debugging from this computer, then run the command again",
        "authorizing": "unlock it and allow USB debugging from this computer, then run the command again",
        "offline": "unplug it and plug it in again, or run `adb reconnect offline`",
        "recovery": "start it normally",
        "no permissions": "add a udev rule for it: apt install android-sdk-platform-tools-common",
    }
    kind = next((known for known in advice if state.startswith(known)), "")
    return f"the phone {serial} is {state}: {advice.get(kind, 'wait until `adb devices` says `device`')}"


def _refusal(message: str, said: str) -> DeviceError:
    """A failure that trying again does not mend, with what to do about it."""
    if "No space left" in said:
        return DeviceError(f"{message}; the phone is full: free some storage and run the command again")
    if "Read-only" in said or "ermission denied" in said:
        return DeviceError(f"{message}; the folder cannot be written: choose another one")
    return DeviceError(message)


def _short(script: str) -> str:
    line = " ".join(script.split())
    return line if len(line) <= 60 else line[:57] + "..."

"""A command on a phone that outlives the cable: started detached, polled, its samples kept round by round.

The job is a script in a folder of its own. It writes out.json, err.txt and progress.txt there and, when it
ends, its exit code to `rc`. Losing the connection does not stop it; the poll goes on when the phone is back.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_ibtm.errors import DeviceError
from edge_ibtm.probe.adb import Adb

SIGNAL_BASE = 128


@dataclass(frozen=True)
class Outcome:
    """How a job ended. code: exit code, above 128 for a signal; None when it vanished without one."""

    code: int | None
    stdout: str
    stderr: str
    progress: str

    @property
    def killed(self) -> bool:
        """Ended by a signal, or gone: by Android for want of memory, by a reboot, or by hand."""
        return self.code is None or self.code > SIGNAL_BASE


def run_job(adb: Adb, folder: str, command: Sequence[str], *, timeout: float, poll: float = 0.5) -> Outcome:
    """Run `command` (words, unquoted) in the remote `folder` and wait for it.

    ConnectionLost when the phone stays away, DeviceError after `timeout` seconds. Whatever interrupts the
    wait, the job is stopped on the phone if the phone can still be reached.
    """
    start(adb, folder, command)
    deadline = time.monotonic() + timeout
    try:
        while not (state := adb.shell(_POLL.format(folder=shlex.quote(folder))).strip()).startswith("done"):
            if state == "gone":
                break
            if time.monotonic() > deadline:
                raise DeviceError(f"the runner took over {timeout:.0f} s on the phone; take fewer samples")
            time.sleep(poll)
    except BaseException:
        stop(adb, folder)
        raise
    code = state.removeprefix("done").strip()
    texts = [read_text(adb, f"{folder}/{name}") for name in ("out.json", "err.txt", "progress.txt")]
    return Outcome(int(code) if code.isdigit() else None, *texts)


_POLL = (
    "cd {folder} || exit 1; "
    "if [ -e rc ]; then echo done $(cat rc); "
    "elif [ -e pid ] && kill -0 $(cat pid) 2>/dev/null; then echo running; "
    "else sleep 0.3; if [ -e rc ]; then echo done $(cat rc); else echo gone; fi; fi"
)


def start(adb: Adb, folder: str, command: Sequence[str]) -> None:
    """Push the job's script and start it once, even if the answer to the start is lost and it is sent again."""
    words = " ".join(shlex.quote(word) for word in command)
    script = (
        f"cd {shlex.quote(folder)} || exit 1\n"
        f"{words} > out.json 2> err.txt < /dev/null &\n"
        "echo $! > pid.new && mv pid.new pid\n"
        "wait $!\n"
        "echo $? > rc.new && mv rc.new rc\n"
    )
    with tempfile.TemporaryDirectory() as work:
        local = Path(work) / "job.sh"
        local.write_text(script)
        adb.push(local, f"{folder}/job.sh")
    quoted = shlex.quote(folder)
    adb.shell(
        f"cd {quoted} || exit 1; "
        "if command -v setsid >/dev/null 2>&1; then s=setsid; else s=; fi; "
        "if mkdir started 2>/dev/null; then $s nohup sh job.sh < /dev/null > /dev/null 2>&1 & fi; "
        "n=0; while [ ! -e pid ] && [ $n -lt 50 ]; do sleep 0.1; n=$((n+1)); done; [ -e pid ]"
    )


def stop(adb: Adb, folder: str) -> None:
    """Kill the job if it still runs; silent when the phone cannot be reached."""
    try:
        adb.shell(f"cd {shlex.quote(folder)} && [ -e pid ] && kill -9 $(cat pid)", check=False, timeout=15)
    except DeviceError:
        return


def read_text(adb: Adb, remote: str) -> str:
    """A text file of the phone, empty when it does not exist."""
    quoted = shlex.quote(remote)
    return adb.shell(f"if [ -e {quoted} ]; then cat {quoted}; fi")

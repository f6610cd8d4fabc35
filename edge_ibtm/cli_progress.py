"""The progress of a run on the screen: a line a stage, and a bar for what is running."""

from __future__ import annotations

import threading
import time
from typing import Any

from edge_ibtm.watch import Watch

_WIDTH = 30
_SECONDS = 30.0  # between progress lines where there is no terminal to draw bars on


class RichWatch(Watch):
    """Draws a run on stderr. Bars appear on terminals only; the lines always."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True, highlight=False)
        self.tasks: dict[str, Any] = {}
        self.said: dict[str, float] = {}
        self.lock = threading.Lock()
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[stage]}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> RichWatch:
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def _line(self, mark: str, stage: str, text: str) -> None:
        self.console.print(f"{mark} {stage:<{_WIDTH}} {text}", soft_wrap=True)

    def skipped(self, stage: str, reason: str) -> None:
        """A stage is not run, and why."""
        self._line("[dim]-[/dim]", stage, f"[dim]skipped: {reason}[/dim]")

    def started(self, stage: str, reason: str) -> None:
        """A stage begins, and why it has to run."""
        with self.lock:
            self.said[stage] = time.monotonic()
            self.tasks[stage] = self.bars.add_task("", total=None, stage=stage, note="")
        self._line("[cyan]>[/cyan]", stage, f"running: {reason}")

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        """A stage is `done` of `total` through."""
        if stage in self.tasks:
            self.bars.update(self.tasks[stage], completed=done, total=total, note=note)
        if not self.console.is_terminal and time.monotonic() - self.said.get(stage, 0.0) > _SECONDS:
            self.said[stage] = time.monotonic()
            self._line(" ", stage, f"{100 * done / max(total, 1):.0f} %{': ' + note if note else ''}")

    def finished(self, stage: str, seconds: float, note: str = "") -> None:
        """A stage is complete."""
        self._drop(stage)
        self._line("[green]+[/green]", stage, f"done in {seconds:.1f} s" + (f": {note}" if note else ""))

    def failed(self, stage: str) -> None:
        """A stage ended with an error or an interrupt."""
        self._drop(stage)
        self._line("[red]x[/red]", stage, "not finished")

    def note(self, text: str) -> None:
        """Something the user should know."""
        self.console.print(f"  {text}", soft_wrap=True)

    def _drop(self, stage: str) -> None:
        with self.lock:
            if stage in self.tasks:
                self.bars.remove_task(self.tasks.pop(stage))

"""What a pipeline tells whoever watches it. The base class is silent; the CLI draws it with rich."""

from __future__ import annotations


class Watch:
    """Receives the events of a run; every method may be overridden, none has to be."""

    def skipped(self, stage: str, reason: str) -> None:
        """A stage is not run, and why."""

    def started(self, stage: str, reason: str) -> None:
        """A stage begins, and why it has to run."""

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        """A stage is `done` of `total` through; `note` carries figures."""

    def finished(self, stage: str, seconds: float, note: str = "") -> None:
        """A stage is complete."""

    def failed(self, stage: str) -> None:
        """A stage ended with an error or an interrupt."""

    def note(self, text: str) -> None:
        """Something the user should know."""

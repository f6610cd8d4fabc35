"""Samples of an unfinished phone probe, kept on this machine so that the next try goes on where the last one
ended.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from edge_ibtm import runner
from edge_ibtm.files import write_text


class Rounds:
    """Rounds of samples (ms, one number a model) of one probe, in a file named by everything that identifies
    it.
    """

    def __init__(self, identity: dict[str, Any], models: int) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = runner.cache_folder() / "probes" / f"{key}.json"
        self.models = models
        self.taken = self._read()

    def _read(self) -> list[list[float]]:
        try:
            held = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return []
        return [row for row in held if self._whole(row)] if isinstance(held, list) else []

    def _whole(self, row: Any) -> bool:
        numbers = isinstance(row, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in row)
        return numbers and len(row) == self.models

    def keep(self, progress: str) -> int:
        """Add the runner's progress lines, a torn last line left out; write them down. Returns the rounds
        held. A file that was kept before, and may have grown since, counts once.
        """
        rows = []
        for line in progress.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if self._whole(row):
                rows.append([float(x) for x in row])
        held = len(self.taken)
        begin = next((i for i in range(held) if self.taken[i : i + len(rows)] == rows[: held - i]), held)
        self.taken[begin : begin + len(rows)] = rows
        write_text(self.path, json.dumps(self.taken))
        return len(self.taken)

    def of_model(self, index: int) -> list[float]:
        """All samples of one model in the order they were taken."""
        return [row[index] for row in self.taken]

    def forget(self) -> None:
        """The probe is complete."""
        self.path.unlink(missing_ok=True)

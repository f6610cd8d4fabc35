"""The runner's JSON line, as results of the schema."""

from __future__ import annotations

import json
from typing import Any

from edge_ibtm.errors import DeviceError


def parse_report(stdout: str) -> dict[str, Any]:
    """The last JSON line of the runner's stdout. DeviceError when there is none: the run was cut short."""
    for line in reversed(stdout.strip().splitlines()):
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict) and report.get("runner") == "edge_ibtm_runner":
            return report
    raise DeviceError(f"the runner printed no result, only: {stdout.strip()[-200:] or 'nothing'}; run it again")

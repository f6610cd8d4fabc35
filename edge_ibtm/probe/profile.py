"""Per-operator times from an ETDump file: which operators cost what, and how much runs outside every
delegate.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.probe.schema import OperatorTime, Profile


def read_profile(path: str | Path, runs: int) -> Profile:
    """Parse an ETDump of `runs` inferences into operator times per inference, longest first.

    A delegate call and the kernels inside it are both events: the kernels count when the delegate reports
    them, the call itself otherwise. Errors: UsageError when the file is no ETDump, EdgeIBTMError when it
    holds no operator.
    """
    from executorch.devtools import Inspector

    if not Path(path).is_file():
        raise UsageError(f"no ETDump file {path}; write one with `--profile` or the runner's --etdump_path")
    try:
        inspector = Inspector(etdump_path=str(path))
    except Exception as error:
        raise UsageError(f"{path} is not an ETDump ({type(error).__name__}: {error})") from None
    events = [e for block in inspector.event_blocks if block.name == "Execute" for e in block.events if e.perf_data]
    rows = _operators(events, runs)
    if not rows:
        raise EdgeIBTMError(f"{path} holds no operator times; was the runtime built with event tracing?")
    total = sum(ms for ms, _ in rows.values())
    operators = tuple(
        OperatorTime(name=name, backend=backend, ms=ms, calls=calls / runs, share=ms / total)
        for (name, backend), (ms, calls) in sorted(rows.items(), key=lambda item: -item[1][0])
    )
    outside = sum(o.ms for o in operators if o.backend == "portable")
    return Profile(operators=operators, total_ms=total, outside_ms=outside, runs=runs)


def _operators(events: list[Any], runs: int) -> dict[tuple[str, str], tuple[float, int]]:
    """(operator, backend) -> (ms per inference, calls over all runs); instances of one operator add up."""
    rows: dict[tuple[str, str], tuple[float, int]] = {}
    inside = calls = 0.0
    for event in events:
        ms, count = sum(event.perf_data.raw) / runs, len(event.perf_data.raw)
        if event.is_delegated_op:
            inside += ms
            key = (re.sub(r"\s*#\d+$", "", event.name), event.delegate_backend_name or "delegate")
        elif event.name.startswith("native_call_"):
            key = (event.name.removeprefix("native_call_"), "portable")
        else:
            calls += ms if event.name == "DELEGATE_CALL" else 0.0
            continue
        old = rows.get(key, (0.0, 0))
        rows[key] = (old[0] + ms, old[1] + count)
    if calls > inside:
        rows[("(delegate calls, not accounted for by kernels)", "delegate")] = (calls - inside, runs)
    return rows


def profile_table(profile: Profile, top: int = 15) -> str:
    """The longest operators as text, one a line, with the time outside delegates last."""
    lines = [f"{'operator':<52} {'backend':<10} {'ms':>9} {'calls':>6} {'share':>6}"]
    lines += [
        f"{o.name[:52]:<52} {o.backend[:10]:<10} {o.ms:>9.4f} {o.calls:>6.0f} {o.share:>6.1%}"
        for o in profile.operators[:top]
    ]
    if len(profile.operators) > top:
        lines.append(f"... and {len(profile.operators) - top} more")
    share = profile.outside_ms / profile.total_ms if profile.total_ms else 0.0
    lines.append(
        f"outside every delegate: {profile.outside_ms:.4f} of {profile.total_ms:.4f} ms ({share:.1%}), "
        f"mean of {profile.runs} traced runs"
    )
    return "\n".join(lines)

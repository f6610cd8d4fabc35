"""edge_ibtm: token merging that fits vision transformers to phones.

Names are loaded on first use, so that `import edge_ibtm` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "build_model": "backbones",
    "insert_mergers": "surgery",
    "remove_mergers": "surgery",
    "merge_trace": "surgery",
    "SiteTrace": "surgery",
    "count_macs": "macs",
    "finetune": "finetune",
    "History": "finetune",
    "quantize": "quantize",
    "lower": "targets",
    "Artifact": "targets",
    "verify": "verify",
    "Verdict": "verify",
    "probe": "probe",
    "Latency": "probe",
}
_MODULES = {"tokens", "information", "errors", "mergers", "backbones"}
__all__ = [*_HOME, "errors", "information", "tokens"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

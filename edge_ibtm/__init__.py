"""edge_ibtm: token merging that fits vision transformers to phones.

Names are loaded on first use, so that `import edge_ibtm` stays cheap. Some functions share the name of the module that
holds them (`edge_ibtm.finetune`): as an attribute of the package the name is the function, always; the module is reached
with `from edge_ibtm.finetune import ...`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
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


class _Package(ModuleType):
    """Keeps importing a submodule from hiding the public function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

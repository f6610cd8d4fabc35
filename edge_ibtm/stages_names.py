"""Which modules compute each stage: a change in their source makes the cached stage stale. `*` as in file names."""

from __future__ import annotations

_MODEL = ("backbones", "checkpoint", "macs*", "modes", "stages")
_MERGE = (*_MODEL, "surgery", "tokens", "short_lines", "constants", "plan", "site", "mergers", "information", "statistics*")
_TRAIN = ("batches", "finetune*")
_DATA = ("data*",)

SOURCES: dict[str, tuple[str, ...]] = {
    "check": (*_MERGE, "quantize*", "rewrite*", "targets"),
    "data": _DATA,
    "base": (*_MODEL, *_TRAIN, *_DATA),
    "merge": (*_MERGE, *_TRAIN),
    "finetune": (*_MERGE, *_TRAIN),
    "quantize": (*_MERGE, *_TRAIN, "quantize*", "rewrite*"),
    "lower": (*_MERGE, "quantize*", "rewrite*", "targets", "lowering"),
    "verify": ("verify", "targets", "stages_artifact", *_DATA),
    "probe": ("probe",),
}

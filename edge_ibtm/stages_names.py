"""Which modules compute each stage: a change in their source makes the cached stage stale."""

from __future__ import annotations

_MODEL = ("backbones", "checkpoint", "macs", "stages")
_MERGE = (*_MODEL, "surgery", "tokens", "plan", "site", "mergers", "information", "statistics", "statistics_sites")
_TRAIN = (
    "finetune", "finetune_checkpoint", "finetune_data", "finetune_eval", "finetune_loop", "finetune_loss",
    "finetune_setup",
)  # fmt: skip
_DATA = ("data", "data_sources")

SOURCES: dict[str, tuple[str, ...]] = {
    "check": ("backbones", "checkpoint", "mergers", "targets", "stages"),
    "data": _DATA,
    "base": (*_MODEL, *_TRAIN, *_DATA),
    "merge": (*_MERGE, *_TRAIN),
    "finetune": (*_MERGE, *_TRAIN),
    "quantize": (*_MERGE, "quantize", "rewrite"),
    "lower": (*_MERGE, "quantize", "rewrite", "targets", "lowering"),
    "verify": ("verify", "targets", "stages_artifact", *_DATA),
    "probe": ("probe",),
}

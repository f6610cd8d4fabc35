"""What the latency benchmark compares: variants of one model, and the files made for them (kept until the source changes)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIZES = {"mobilevit_s": 256, "mobilevit_xs": 256, "mobilevit_xxs": 256}
SHORT = {"vit_small": "vit_small_patch16_224", "swin_tiny": "swin_tiny_patch4_window7_224"}


@dataclass(frozen=True)
class Variant:
    """One contestant: how it is built and which engine runs it (torch, compile, executorch, onnxruntime, openvino, litert)."""

    name: str
    engine: str
    merger: str | None = None
    density: str | None = None
    plain: bool = False
    scheme: str | None = None

    @property
    def suffix(self) -> str:
        suffixes = {"executorch": ".pte", "onnxruntime": ".onnx", "openvino": ".onnx", "litert": ".tflite"}
        return suffixes.get(self.engine, "")

    @property
    def file(self) -> str:
        """Name of the artifact; onnxruntime and OpenVINO share one ONNX file."""
        return ("base" if self.suffix == ".onnx" else self.name) + self.suffix


def variants(
    model: str, mergers: Sequence[str], densities: Sequence[str], engines: Sequence[str], int8: bool
) -> list[Variant]:
    """All contestants of one model: the base in every engine, ours unmerged, merged by merger and by density, int8."""
    found = [Variant("timm eager", "torch"), Variant("torch.compile", "compile")]
    found += [Variant("onnxruntime", "onnxruntime"), Variant("OpenVINO", "openvino"), Variant("LiteRT", "litert")]
    found = [v for v in found if v.engine in engines]
    found += [Variant("plain export", "executorch", plain=True), Variant("ours", "executorch")]
    found += [Variant(f"{m}", "executorch", merger=m) for m in mergers]
    for density in densities:
        found += [Variant(f"{m}, {density}", "executorch", merger=m, density=density) for m in ("ibtm", "uniform")]
    if int8:
        found += [Variant("int8", "executorch", scheme="auto")]
        found += [Variant("ibtm int8", "executorch", merger="ibtm", scheme="auto")]
    return found


def model_of(name: str, size: int, variant: Variant, keep_ratio: float) -> Any:
    """The eager model of a variant, with random weights (latency does not depend on them), always the same ones."""
    import torch

    from edge_ibtm import build_model, insert_mergers

    torch.manual_seed(0)
    model = build_model(SHORT.get(name, name), img_size=size)
    if variant.merger:
        insert_mergers(model, merger=variant.merger, keep_ratio=keep_ratio, density=variant.density or "auto")
        _fill_masks(model)
    return model.eval()


def _fill_masks(model: Any) -> None:
    """Random statistics in IBTM's mask modules: zeros of one shape would be kept once, and the file be too small."""
    import torch

    from edge_ibtm.statistics_sites import mask_modules

    for step in mask_modules(model).values():
        clusters, classes = step.likelihood.shape
        centroids = torch.nn.functional.normalize(torch.randn_like(step.centroids), dim=-1)
        step.load_statistics(centroids, torch.rand(clusters, classes).softmax(0), torch.full((classes,), 1 / classes))


def make_file(name: str, size: int, variant: Variant, keep_ratio: float, folder: Path) -> dict[str, Any]:
    """Make an artifact unless this source made it; returns its facts (MACs, bytes, subgraphs, CPU seconds to make it)."""
    from edge_ibtm.cache import source_hash
    from edge_ibtm.stages_names import SOURCES

    facts = folder / f"{variant.name.replace(' ', '_').replace(',', '')}.json"
    ours = variant.engine == "executorch" and not variant.plain
    source = source_hash(SOURCES["lower"]) if ours else None
    if facts.exists() and (not variant.suffix or (folder / variant.file).exists()):
        known = dict(json.loads(facts.read_text()))
        if known.get("source") == source:
            return known
    from edge_ibtm import count_macs
    from edge_ibtm.files import replacing

    model = model_of(name, size, variant, keep_ratio)
    found: dict[str, Any] = {**asdict(variant), "macs": count_macs(model, size), "sites": _sites(model), "source": source}
    start = time.process_time()
    found |= MAKERS[variant.engine](model, size, variant, folder / variant.file)
    found["make_cpu_s"] = round(time.process_time() - start, 2)
    with replacing(facts) as temporary:
        temporary.write_text(json.dumps(found))
    return found


def _sites(model: Any) -> int:
    from edge_ibtm.site import Site

    return sum(isinstance(m, Site) for m in model.modules())


def _pte(model: Any, size: int, variant: Variant, path: Path) -> dict[str, Any]:
    import torch

    from edge_ibtm.quantize import quantize
    from edge_ibtm.targets import lower

    example = torch.randn(1, 3, size, size)
    if variant.plain:
        return _plain_pte(model, example, path)
    if variant.scheme:
        model = quantize(model, [torch.randn(1, 3, size, size) for _ in range(4)], scheme=variant.scheme)
    artifact = lower(model, example, path)
    return {"bytes": artifact.bytes, "subgraphs": artifact.subgraphs, "left_out": artifact.non_delegated}


def _plain_pte(model: Any, example: Any, path: Path) -> dict[str, Any]:
    """What ExecuTorch's documentation says: export timm's model as it is, partition for XNNPACK."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from edge_ibtm.targets.common import delegation, write_program

    program = torch.export.export(model, (example,))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    counts = delegation(edge.exported_program().graph_module)
    write_program(edge.to_executorch(), path)
    return {"bytes": path.stat().st_size, "subgraphs": counts[0], "left_out": counts[2]}


def _onnx(model: Any, size: int, variant: Variant, path: Path) -> dict[str, Any]:
    import torch

    if not path.exists():
        torch.onnx.export(model, (torch.randn(1, 3, size, size),), str(path), dynamo=False, opset_version=17)
    return {"bytes": path.stat().st_size}


def _tflite(model: Any, size: int, variant: Variant, path: Path) -> dict[str, Any]:
    import litert_torch
    import torch

    if not path.exists():
        litert_torch.convert(model, (torch.randn(1, 3, size, size),)).export(str(path))
    return {"bytes": path.stat().st_size}


def _nothing(model: Any, size: int, variant: Variant, path: Path) -> dict[str, Any]:
    return {}


MAKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "executorch": _pte, "onnxruntime": _onnx, "openvino": _onnx, "litert": _tflite, "torch": _nothing, "compile": _nothing,
}  # fmt: skip

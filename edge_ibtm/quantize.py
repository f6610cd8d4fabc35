"""PT2E quantization for XNNPACK: static int8 per channel, dynamic int8, mixed precision.

Source: torchao's PT2E flow (capture, prepare, calibrate, convert) with ExecuTorch's XNNPACKQuantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from edge_ibtm.errors import UsageError, lookup

# Modules whose arithmetic picks tokens or normalises them: comparisons are clamps of huge differences there, and
# quantizing them would change which tokens merge.
FLOAT_MODULES = ("edge_ibtm.mergers.", "edge_ibtm.site.", "edge_ibtm.rewrite_norm.")
MOSTLY = 0.9  # share of the weights in linear layers from which on `auto` measures activations at run time
_ATEN = torch.ops.aten
VIEWS = {_ATEN.reshape.default, _ATEN.view.default, _ATEN.permute.default, _ATEN.contiguous.default, _ATEN.clone.default}
HEAVY = {_ATEN.linear.default, _ATEN.conv2d.default, _ATEN.convolution.default}


def quantize(model: nn.Module, calibration: Iterable[Any], *, scheme: str = "int8", **options: Any) -> nn.Module:
    """The converted graph module of `model`, ready for `lower`; the model itself is untouched.

    calibration: batches of images [B, 3, H, W] (or tuples that begin with them), all of one shape; the graph
    keeps the shape of the first. scheme: "int8" (weights per channel, activations static), "int8_dynamic"
    (linear layers only, activations measured at run time, norms smoothed, patches' embedding in float), "auto" (int8_dynamic
    for what is nearly all linear layers, as ViTs and Swins are, else int8), "mixed" (as auto, the worst layers left in float).
    """
    from edge_ibtm.targets.common import check_alike

    convert = lookup("quantization scheme", scheme, SCHEMES)
    _check_options(scheme, options)
    if isinstance(calibration, torch.Tensor) or not isinstance(calibration, Iterable):
        given = f"one tensor {tuple(calibration.shape)}" if isinstance(calibration, torch.Tensor) else repr(calibration)
        raise UsageError(f"calibration is {given}; give a list of batches, such as [images]")
    batches = [images_of(batch) for batch in calibration]
    if not batches:
        raise UsageError("quantization needs at least one calibration batch, got none")
    check_alike(batches, "calibration images")
    shape = tuple(batches[0].shape)
    if len(shape) != 4 and any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise UsageError(f"a calibration batch has shape {shape}; give images [B, 3, H, W], a single one as image[None]")
    return convert(model, batches, **options)


def _check_options(scheme: str, options: dict[str, Any]) -> None:
    known = [p.name for p in signature(SCHEMES[scheme]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    strange = [name for name in options if name not in known]
    if strange:
        has = f"it has {', '.join(known)}" if known else "leave it out"
        raise UsageError(f"scheme {scheme!r} has no option {', '.join(strange)}; {has}")


def images_of(batch: Any) -> torch.Tensor:
    """The images of a calibration batch: the batch itself, or the first of a tuple. UsageError unless they can set ranges."""
    from edge_ibtm.targets.common import check_floating

    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(images, torch.Tensor):
        raise UsageError(f"a calibration batch must be a tensor of images, got {type(images).__name__}")
    if images.numel() == 0:
        raise UsageError(f"a calibration batch of shape {tuple(images.shape)} holds no image; leave it out")
    check_floating(images)
    if not images.isfinite().all():
        raise UsageError("a calibration batch holds NaN or infinity, which no range spans; leave those images out")
    return images


def capture_graph(model: nn.Module, example: torch.Tensor) -> torch.fx.GraphModule:
    """The rewritten model as a graph module, its operators not yet decomposed."""
    from edge_ibtm.rewrite import export_rewritten
    from edge_ibtm.rewrite_graph import pads_as_concatenations, split_silu
    from edge_ibtm.targets.common import exporting

    with exporting(model, (example,)):
        graph = export_rewritten(model, (example,)).module()
    pads_as_concatenations(graph)
    split_silu(graph)
    return graph


def module_types(node: Node) -> list[str]:
    """Dotted class names of the modules a node was traced in, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [t if isinstance(t, str) else f"{t.__module__}.{t.__qualname__}" for _, t in stack]


def module_path(node: Node) -> str:
    """Dotted name of the innermost module a node was traced in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0].removeprefix("L['self'].") if stack else ""


def quantizable(node: Node) -> bool:
    """Whether a node may be quantized: convolutions and linear layers with weights of their own, and those weights.

    Never inside a merge site or a norm, and no product with a constant row (one output: a sum or a mean).
    """
    if node.op == "get_attr":
        return True
    if node.target not in HEAVY or not isinstance(node.args[1], Node) or node.args[1].op != "get_attr":
        return False
    if any(t.startswith(FLOAT_MODULES) for t in module_types(node)):
        return False
    return node.args[1].meta["val"].shape[0] > 1


def quantizer(*, dynamic: bool = False, qat: bool = False, keep: Callable[[Node], bool] = quantizable) -> Any:
    """XNNPACK's quantizer, weights per channel, for the nodes `keep` accepts, and unless dynamic for what is between them."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantizer.composable_quantizer import ComposableQuantizer

    from edge_ibtm.quantize_between import BetweenQuantizer, LayerQuantizer

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic, is_qat=qat)
    layers = LayerQuantizer().set_global(config).set_filter_function(keep)
    return layers if dynamic else ComposableQuantizer([layers, BetweenQuantizer(config.input_activation)])


def _static(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    return convert_static(capture_graph(model, batches[0]), batches, quantizable)


def convert_static(graph: Any, batches: list[torch.Tensor], keep: Callable[[Node], bool]) -> nn.Module:
    """Prepare, calibrate and convert a captured graph; nodes that `keep` refuses stay in float."""
    return _convert(graph, batches, quantizer(keep=keep))


def _dynamic(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    return convert_dynamic(_smoothed(model, batches), batches, _linear)


def convert_dynamic(graph: Any, batches: list[torch.Tensor], keep: Callable[[Node], bool]) -> nn.Module:
    """Prepare and convert a captured graph, activations measured at run time; nodes that `keep` refuses stay in float."""
    return _convert(graph, batches[:1], quantizer(dynamic=True, keep=keep))


def _smoothed(model: nn.Module, batches: list[torch.Tensor]) -> Any:
    from edge_ibtm.quantize_smooth import smooth_norms

    graph: Any = capture_graph(model, batches[0])
    smooth_norms(graph, _pieces(batches), _linear)
    return graph


def _linear(node: Node) -> bool:
    """Whether a node may be quantized dynamically: a depthwise convolution so quantized does not run (executorch 1.5.1).

    The embedding of patches stays in float: of a trained ViT-S/14's layers it cost most, for 1 % of the weights (docs/LOG.md).
    """
    if node.op == "get_attr":
        return quantizable(node)
    return node.target is _ATEN.linear.default and quantizable(node) and not _reads_image(node)


def _reads_image(node: Node) -> bool:
    """Whether a layer reads images, cut and turned at most."""
    source = node.args[0]
    while isinstance(source, Node) and source.target in VIEWS:
        source = source.args[0]
    return isinstance(source, Node) and source.op == "placeholder" and source.meta["val"].ndim == 4


def _convert(graph: Any, batches: list[torch.Tensor], chosen: Any) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    prepared = prepare_pt2e(graph, chosen)
    with torch.no_grad():
        for piece in _pieces(batches):
            prepared(piece)
    return converted(prepared)


def _pieces(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The images in batches of the first one's shape, which a captured graph takes; what is left over is left out."""
    size = batches[0].shape
    return [piece for batch in batches for piece in batch.split(size[0]) if piece.shape == size]


def converted(prepared: Any) -> nn.Module:
    """A calibrated or trained graph converted to 8-bit operators."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    from edge_ibtm.quantize_products import move_zero_points

    graph = convert_pt2e(prepared)
    move_zero_points(graph)
    return graph


def _mixed(
    model: nn.Module, batches: list[torch.Tensor], *, min_sqnr: float = 30.0, most: float = 0.03
) -> nn.Module:
    """8 bits as `auto` chooses them, the layers that cost most precision for their size left in float: as few as reach
    `min_sqnr` dB, with at most a share `most` of the weights (a share s of them makes an 8-bit file larger by 3 s).

    The Choice is under `quantization` in the returned module's `meta`; str() of it gives the reason.
    """
    from edge_ibtm.quantize_sensitivity import Choice, affordable, sensitivity, sqnr_db

    if not 0 <= most <= 1 or not min_sqnr < float("inf"):
        raise UsageError(f"mixed precision with most={most}, min_sqnr={min_sqnr}: give a share of 0 to 1 and decibels")
    scheme, _ = _automatic(model)
    dynamic = scheme == "int8_dynamic"
    graph = _smoothed(model, batches) if dynamic else capture_graph(model, batches[0])
    convert, keep = (convert_dynamic, _linear) if dynamic else (convert_static, quantizable)
    noise = sensitivity(graph, batches[0], keep, module_path, dynamic)
    candidates = affordable(noise, most)
    pieces = _pieces(batches)[:16]
    with torch.no_grad():
        wanted = torch.cat([graph(piece) for piece in pieces])
    first = None
    for count in _counts(len(candidates)):
        names = {layer.node for layer in candidates[:count]}
        rounded: Any = convert(copy.deepcopy(graph), batches, partial(_but, names, keep))
        with torch.no_grad():
            reached = sqnr_db(wanted, torch.cat([rounded(piece) for piece in pieces]))
        first = reached if first is None else first
        rounded.meta["quantization"] = Choice(scheme, tuple(candidates[:count]), len(noise), first, reached, min_sqnr)
        if reached >= min_sqnr:
            break
    return rounded


def _but(names: set[str], keep: Callable[[Node], bool], node: Node) -> bool:
    return node.name not in names and keep(node)


def _counts(limit: int) -> list[int]:
    """0, 1, 2, 4, ... layers, up to `limit`."""
    counts = [0]
    while counts[-1] < limit:
        counts.append(min(limit, max(1, 2 * counts[-1])))
    return counts


def _auto(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """The scheme that is nearer to float and the faster one for the model; `quantization` in its `meta` says which."""
    scheme, linear = _automatic(model)
    graph: Any = SCHEMES[scheme](model, batches)
    graph.meta["quantization"] = f"{scheme}, as linear layers hold {linear:.0%} of the weights"
    return graph  # type: ignore[no-any-return]


def _automatic(model: nn.Module) -> tuple[str, float]:
    """The scheme for a model, and the share of its weights in linear layers that decides it."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    weights = sum(m.weight.numel() for m in layers)
    linear = sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear)) / max(weights, 1)
    return "int8_dynamic" if linear >= MOSTLY else "int8", linear


SCHEMES: dict[str, Callable[..., nn.Module]] = {
    "int8": _static, "int8_dynamic": _dynamic, "mixed": _mixed, "auto": _auto,
}  # fmt: skip

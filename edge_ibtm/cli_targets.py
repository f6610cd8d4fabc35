"""Commands of the targets: check, lower, verify. Parses, calls, prints; imports nothing heavy."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_ibtm.errors import EdgeIBTMError, UsageError, refuse
from edge_ibtm.files import check_pte

if TYPE_CHECKING:
    from torch import nn

    from edge_ibtm.verify import Limits

Model = Annotated[str, typer.Option("--model", help="model name (edge-ibtm list)")]
Weights = Annotated[str | None, typer.Option(help="file (safetensors, .pth), 'pretrained', or none: random")]
Classes = Annotated[int, typer.Option("--classes", help="number of classes")]
Size = Annotated[int | None, typer.Option("--img-size", help="pixels; default: the model's own")]
Merger = Annotated[str | None, typer.Option(help="merger for --keep-ratio; default ibtm")]
Keep = Annotated[float | None, typer.Option(help="insert mergers that keep this share of the tokens")]
MinSqnr = Annotated[
    float | None, typer.Option(help="gate over all images, dB; default 80; in a run, and for Core ML, a recipe's gates")
]
TargetName = Annotated[str, typer.Option("--target", help="xnnpack, portable, vulkan, coreml, coreml_pte, torch")]


def register(app: typer.Typer) -> None:
    """Add this module's commands to the command line."""
    app.command("check")(check_command)
    app.command("lower")(lower_command)
    app.command("verify")(verify_command)


def _build(
    model: str, weights: str | None, classes: int, img_size: int | None, merge: tuple[str | None, float | None]
) -> nn.Module:
    import torch

    from edge_ibtm import build_model, insert_mergers

    torch.manual_seed(0)  # what the weights leave out is the same in `lower` and in `verify`
    merger, keep_ratio = merger_for(*merge), merge[1]
    if keep_ratio is None:
        return build_model(model, num_classes=classes, weights=weights, img_size=img_size)
    saved = weights if weights not in (None, "pretrained") else None
    built = build_model(model, num_classes=classes, weights=None if saved else weights, img_size=img_size)
    if not saved:
        return insert_mergers(built, merger=merger, keep_ratio=keep_ratio)
    return _load_merged(built, saved, (merger, keep_ratio))


def _tell_random(weights: str | None) -> None:
    if weights is None:
        typer.echo("note: the weights are random (seed 0); give --weights", err=True)


def merger_for(merger: str | None, keep_ratio: float | None) -> str:
    """The merger of a command line; UsageError if unknown, or given without --keep-ratio, when nothing is merged."""
    from edge_ibtm.mergers import classes_of

    if merger is None:
        return "ibtm"
    classes_of(merger)
    if keep_ratio is None:
        raise UsageError(f"--merger {merger} merges nothing without --keep-ratio; give it too, e.g. --keep-ratio 0.7")
    return merger


def _load_merged(model: nn.Module, file: str, merge: tuple[str, float]) -> nn.Module:
    """Weights of the base go in before the mergers, weights of a merged model after them: the keys tell which."""
    from edge_ibtm import insert_mergers
    from edge_ibtm.checkpoint import is_merged, load_into, read_state

    state = read_state(file)
    if not is_merged(state):
        load_into(model, state, file)
    insert_mergers(model, merger=merge[0], keep_ratio=merge[1])
    if is_merged(state):
        load_into(model, state, file)
    return model.eval()


def check_command(
    model: Model,
    target: TargetName = "xnnpack",
    classes: Classes = 1000,
    img_size: Size = None,
    keep_ratio: Keep = None,
    merger: Merger = None,
    allow_fallback: Annotated[bool, typer.Option(help="accept operators outside the delegate")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Before any training: what TARGET leaves outside its delegate, what has no kernel, and what to change."""
    from edge_ibtm.check import check, example_for

    built = _build(model, None, classes, img_size, (merger, keep_ratio))
    found = check(built, example_for(built, img_size), target=target)
    typer.echo(json.dumps(asdict(found), default=str) if as_json else "\n".join(found.lines()))
    found.require(allow_fallback)


def lower_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")],
    target: TargetName = "xnnpack",
    weights: Weights = None,
    classes: Classes = 1000,
    img_size: Size = None,
    keep_ratio: Keep = None,
    merger: Merger = None,
) -> None:
    """Write the artifact of a model for TARGET; the last line is JSON."""
    from edge_ibtm.check import example_for
    from edge_ibtm.targets import lower

    built = _build(model, weights, classes, img_size, (merger, keep_ratio))
    _tell_random(weights)
    artifact = lower(built, example_for(built, img_size), output, target=target)
    total = artifact.delegated + artifact.non_delegated
    typer.echo(
        f"{artifact.path}: {artifact.bytes / 1e6:.2f} MB, {artifact.subgraphs} subgraphs, "
        f"{artifact.delegated} of {total} nodes delegated"
    )
    typer.echo(json.dumps(asdict(artifact), default=str))


def verify_command(
    artifact: Annotated[Path, typer.Argument(help=".pte, .pt2 or .mlpackage")],
    model: Annotated[str | None, typer.Option("--model", help="model it came from")] = None,
    weights: Weights = None,
    classes: Annotated[int | None, typer.Option(help="number of classes; default 1000")] = None,
    img_size: Size = None,
    keep_ratio: Keep = None,
    merger: Merger = None,
    inputs: Annotated[Path | None, typer.Option(help=".pt file with normalised images [B, 3, H, W]")] = None,
    min_sqnr: MinSqnr = None,
    images: Annotated[int | None, typer.Option(help="held-out images, in a run directory; default the recipe's")] = None,
    arch: Annotated[str | None, typer.Option(help="aarch64: run on an emulated Arm CPU instead")] = None,
) -> None:
    """Run an artifact and the model it came from on the same images; exit 1 if they differ. The last line is JSON.

    In a run directory of `compress` the model and held-out images are found (one of them for --arch); elsewhere --model
    names the model, and the images are noise unless --inputs is given.
    """
    described: dict[str, object] = {"--weights": weights, "--classes": classes, "--img-size": img_size}
    if model is None:
        described |= {"--keep-ratio": keep_ratio, "--merger": merger}
        refuse(described, "these describe the model that --model names; give --model too, or leave them out")
    if model or inputs or arch:
        refuse({"--images": images}, "counts held-out images of a run directory; leave out --model, --inputs, --arch")
    given, eager = _images(inputs), None
    if model is not None:
        eager = _build(model, weights, 1000 if classes is None else classes, img_size, (merger, keep_ratio))
        _tell_random(weights)
    if arch is not None:
        refuse({"--min-sqnr": min_sqnr}, "is a gate of runs on this host; --arch has its own")
        _verify_arch(arch, artifact, given, eager, img_size)
        return
    from edge_ibtm.verify import Limits

    eager, shown, limits, kind = _origin(artifact, images) if eager is None else _noise(artifact, eager, img_size)
    if given is not None:
        shown, kind = given, "images"
    _compare(eager, artifact, shown, limits if min_sqnr is None else Limits(sqnr_db=min_sqnr), kind)


def _origin(artifact: Path, images: int | None) -> tuple[nn.Module, Any, Limits, str]:
    """Model, images, limits and what the images are, from the run directory the artifact is in."""
    from edge_ibtm.provenance import origin_of

    origin = origin_of(artifact, images)
    return origin.reference, origin.images, origin.limits, "held-out images"


def _noise(artifact: Path, model: nn.Module, img_size: int | None) -> tuple[nn.Module, Any, Limits, str]:
    """The same for a model that was named."""
    from edge_ibtm.check import example_for

    return model, example_for(model, img_size), _usual_limits(artifact), "images of noise"


def _compare(eager: nn.Module, artifact: Path, shown: Any, limits: Limits, kind: str) -> None:
    from edge_ibtm.verify import verify

    verdict = verify(eager, artifact, list(shown.split(1)), limits=limits, isolated=True)
    typer.echo(
        f"{artifact}: SQNR {verdict.sqnr_db:.1f} dB (median image {verdict.sqnr_median_db:.1f}, lowest "
        f"{verdict.sqnr_lowest_db:.1f}), least cosine {verdict.cosine:.6f}, max error {verdict.max_abs:.3g}, "
        f"same top-1 {verdict.top1_agreement:.0%} of {verdict.samples} {kind}"
    )
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(verdict).items()}
    typer.echo(json.dumps(finite))
    verdict.require(str(artifact))


def _usual_limits(artifact: Path) -> Limits:
    """What a recipe asks of a package by default, by the precision written in it; of anything else what fp32 reaches."""
    from edge_ibtm.config import VerifySection
    from edge_ibtm.gates import limits_of
    from edge_ibtm.targets.runtime import holds_coreml
    from edge_ibtm.verify import Limits

    precision = "fp32"
    if artifact.suffix == ".mlpackage":
        from edge_ibtm.targets.coreml import package_facts

        precision = package_facts(artifact).metadata.get("precision", "fp32")
    elif artifact.suffix == ".pte" and holds_coreml(artifact):
        precision = "fp16"
    asked = limits_of(VerifySection(), precision)
    return Limits(**asked) if any(asked.values()) else Limits()


def _images(path: Path | None) -> Any:
    if path is None:
        return None
    import torch

    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        images = torch.load(path, weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} is not a tensor file that torch.load reads with weights_only: {error}") from error
    if not isinstance(images, torch.Tensor) or images.ndim != 4:
        raise UsageError(f"{path} must hold one tensor of images [B, 3, H, W]")
    if images.numel() == 0:
        raise UsageError(f"{path} holds no image: its tensor is {list(images.shape)}; give at least one [1, 3, H, W]")
    return images


def _verify_arch(arch: str, artifact: Path, images: Any, model: nn.Module | None, img_size: int | None) -> None:
    if arch != "aarch64":
        raise UsageError(f"unknown --arch {arch!r}; known: aarch64")
    import torch

    from edge_ibtm.check import example_for
    from edge_ibtm.cli_probe import report
    from edge_ibtm.probe.emulated import verify_aarch64
    from edge_ibtm.probe.parity import EAGER
    from edge_ibtm.probe.schema import ProbeRun
    from edge_ibtm.provenance import origin_of, reported

    path = check_pte(artifact)
    expected = None
    if model is None and reported(path):
        origin = origin_of(path, 1)
        model, images = origin.reference, origin.images if images is None else images
    if model is not None:
        images = example_for(model, img_size) if images is None else images
        with torch.no_grad():
            expected = [model(images)]
    result = verify_aarch64(path, None if images is None else [images], expected)
    parity: Any = result.parity
    typer.echo(report(ProbeRun(results=(result,))))
    if parity.ok:
        return
    if parity.reference == EAGER:
        raise EdgeIBTMError(
            f"{artifact} computes on aarch64 what it computes here, but not what the model does: max abs difference "
            f"{parity.max_abs:.3g} from it; is it the model, with the weights and --keep-ratio, it was lowered from?"
        )
    hint = "; --model, with what describes it, also judges by the model's own outputs" if expected is None else ""
    raise EdgeIBTMError(
        f"{artifact} computes something else on aarch64: max abs difference {parity.max_abs:.3g}, asked for: {parity.limit}; "
        f"{'; '.join(result.notes)}{hint}"
    )

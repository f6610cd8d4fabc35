"""An artifact against the model it came from, by loading and running it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_ibtm.errors import GateError, UsageError
from edge_ibtm.modes import evaluating
from edge_ibtm.targets.common import Artifact, check_alike, check_example, first_line


@dataclass(frozen=True)
class Limits:
    """What a verdict must reach. SQNRs in dB; top1_agreement and cosine in 0..1; max_abs in output units.

    sqnr_db is over all samples together, so the worst sample rules it. sqnr_median_db is for artifacts that round values
    otherwise than their reference: a merged model is continuous only while no near tie between tokens is decided otherwise.
    """

    sqnr_db: float | None = 80.0
    sqnr_median_db: float | None = None
    cosine: float | None = None
    max_abs: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Verdict:
    """How near the artifact's outputs are to the reference's, over `samples` rows of output."""

    sqnr_db: float
    sqnr_median_db: float
    sqnr_lowest_db: float
    cosine: float
    max_abs: float
    top1_agreement: float
    samples: int
    ok: bool
    failures: tuple[str, ...] = ()

    def require(self, what: str = "the artifact") -> Verdict:
        """Itself, or GateError that names the limits that were missed."""
        if not self.ok:
            raise GateError(f"{what} does not match its reference: {'; '.join(self.failures)}")
        return self


def verify(
    reference: nn.Module, artifact: Any, inputs: Any, *, limits: Limits | None = None, isolated: bool = False
) -> Verdict:
    """Run the artifact and its reference on the same images and compare the outputs.

    reference: eager or converted module, images -> logits [B, classes]. artifact: Artifact or path of a `.pte`,
    `.pt2` or `.mlpackage`. inputs: one batch [B, 3, H, W], or a list of batches, each of the lowered shape or a
    multiple of it (cut into pieces of the lowered batch). isolated: run a `.pte` in a child process. Raises
    UsageError for a file that cannot be run here.
    """
    path = Path(artifact.path if isinstance(artifact, Artifact) else artifact)
    batches = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if any(x.numel() == 0 for x in check_example(batches)):
        shapes = [list(x.shape) for x in batches]
        raise UsageError(f"nothing to compare on: inputs of {shapes}; give at least one image")
    check_alike(batches, "images to compare on")
    if not isinstance(limits, Limits | None):
        raise UsageError(f"limits is {limits!r}; give a Limits of edge_ibtm.verify, such as Limits(sqnr_db=60)")
    run = runner_of(path, isolated=isolated)
    with torch.no_grad():
        got = run(torch.cat(batches))  # first: it says which shape it takes
        wanted = torch.cat([run_reference(reference, batch) for batch in batches])
    return compare_outputs(wanted, got, limits or Limits())


def run_reference(reference: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Outputs of an eager module in eval mode, or of a captured graph in pieces of the batch it was captured with."""
    if not isinstance(reference, torch.fx.GraphModule):
        with evaluating(reference):
            return _first(reference(images))
    inputs = [n for n in reference.graph.nodes if n.op == "placeholder"]
    size = inputs[0].meta["val"].shape[0] if "val" in inputs[0].meta else 1
    return torch.cat([_first(reference(piece)) for piece in images.split(int(size))])


def runner_of(path: Path, *, isolated: bool = False) -> Any:
    """A function images [B, 3, H, W] -> outputs that runs the artifact at `path` on this host.

    isolated: run a `.pte` in a child process, where native code may abort. A `.pte` for Core ML is evaluated where
    Core ML is not (`edge_ibtm.targets.mil_eval`).
    """
    if path.suffix == ".pte":
        from edge_ibtm.targets.runtime import batch_runner, holds_coreml, run_isolated

        if holds_coreml(path):
            from edge_ibtm.targets.coreml_pte import PackageInside

            return PackageInside(path)
        return partial(run_isolated, path) if isolated else batch_runner(path)
    if path.suffix == ".pt2":
        return _program_runner(path)
    if path.suffix == ".mlpackage":
        from edge_ibtm.targets.coreml import run_mlpackage

        return lambda images: run_mlpackage(path, images)
    raise UsageError(f"cannot verify {path}: a .pte, .pt2 or .mlpackage is needed")


def _program_runner(path: Path) -> Any:
    """The runner of a `.pt2`, in pieces of the batch it was exported with."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        module: Any = torch.export.load(path).module()
    except Exception as error:  # whatever the archive's reader says
        why = first_line(error)
        raise UsageError(f"{path} is no exported program (.pt2) that torch {torch.__version__} reads: {why}") from error

    def run(images: torch.Tensor) -> torch.Tensor:
        try:
            return run_reference(module, images)
        except (AssertionError, RuntimeError) as error:  # the guards that torch.export writes
            raise UsageError(f"{path} does not take images of {list(images.shape)}: {first_line(error)}") from error

    return run


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def compare_outputs(wanted: torch.Tensor, got: torch.Tensor, limits: Limits) -> Verdict:
    """Verdict of two outputs [B, ...]. SQNR in dB = 10 log10(|wanted|^2 / |wanted - got|^2), at most 200.

    sqnr_db sums both over all samples; the median and the lowest are of the samples' own.
    """
    if wanted.shape != got.shape:
        raise UsageError(f"the artifact's output has shape {tuple(got.shape)}, the reference's {tuple(wanted.shape)}")
    a, b = wanted.detach().double().flatten(1), got.detach().double().flatten(1)
    signal, noise = a.square().sum(1), (a - b).square().sum(1)
    each = _decibel(signal, noise)
    cosine = float(torch.cosine_similarity(a, b, dim=1).min())
    agree = float((a.argmax(1) == b.argmax(1)).double().mean())
    measured = {
        "sqnr_db": float(_decibel(signal.sum(), noise.sum())),
        "sqnr_median_db": float(each.quantile(0.5)),  # of an even number, the mean of both middles
        "cosine": cosine,
        "top1_agreement": agree,
    }
    max_abs = float((a - b).abs().max())
    failures = [
        f"{name} {value:.4g} is below {getattr(limits, name):.4g}"
        for name, value in measured.items()
        if getattr(limits, name) is not None and not value >= getattr(limits, name)
    ]
    if limits.max_abs is not None and not max_abs <= limits.max_abs:
        failures.append(f"max_abs {max_abs:.4g} is above {limits.max_abs:.4g}")
    if not torch.isfinite(b).all():
        failures.append("the artifact's output holds NaN or infinity")
    measured |= {"sqnr_lowest_db": float(each.min()), "max_abs": max_abs}
    return Verdict(**measured, samples=len(a), ok=not failures, failures=tuple(failures))


def _decibel(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Elementwise; 200 where nothing differs, NaN where the noise is."""
    return torch.where(noise == 0, 200.0, 10 * torch.log10(signal / noise)).clamp(max=200.0)

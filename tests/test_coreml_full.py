"""Merged models in Core ML against eager on real images: every family small, the four of issue 6 at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coreml_models import MEAN, STD, digits, normalised, photographs, randomised, reference, sqnr

import edge_ibtm
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.data import View, load_data
from edge_ibtm.finetune import FinetuneConfig
from edge_ibtm.targets.coreml import CoreMLOptions, lower_coreml, run_mlpackage


@pytest.mark.slow
@pytest.mark.parametrize("family", ["efficientvit", "swin", "mobilevit"])
def test_families_in_half_precision(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, size = BACKBONES[family].twin()
    merged = randomised(edge_ibtm.insert_mergers(model, merger="ibtm", keep_ratio=0.7))
    shown = digits(size, 8)
    artifact = lower_coreml(merged, normalised(shown[:1]), tmp_path / "m.mlpackage", CoreMLOptions(mean=MEAN, std=STD))
    wanted = reference(merged, shown)
    got = run_mlpackage(artifact.path, shown)
    assert sqnr(wanted, got) >= 40
    assert torch.equal(got.argmax(1), wanted.argmax(1))


@pytest.mark.slow
def test_a_trained_model_agrees_on_the_demo_set(tmp_path: Path) -> None:
    """Issue 6: fp16 and its eager model name the same class on at least 99 % of the held-out demo images."""
    torch.manual_seed(0)
    model, size = BACKBONES["vit"].twin()
    model.reset_classifier(10)
    merged = edge_ibtm.insert_mergers(model, merger="ibtm", keep_ratio=0.7)
    data = load_data(None, View(img_size=size))
    edge_ibtm.finetune(merged, data.train, None, FinetuneConfig(epochs=30, lr=2e-3, warmup_epochs=1, seed=0))
    shown = torch.stack([data.test[i][0] for i in range(len(data.test))])
    labels = torch.tensor([data.test[i][1] for i in range(len(data.test))])
    artifact = lower_coreml(
        merged.eval(), shown[:1], tmp_path / "m.mlpackage", CoreMLOptions(mean=data.mean, std=data.std)
    )
    with torch.no_grad():
        wanted = merged(shown)
    got = run_mlpackage(artifact.path, shown)
    top1 = [float((logits.argmax(1) == labels).float().mean()) for logits in (wanted, got)]
    agreement = float((wanted.argmax(1) == got.argmax(1)).float().mean())
    print(f"trained vit twin: {sqnr(wanted, got):.1f} dB, top-1 {top1[0]:.3f} eager, {top1[1]:.3f} fp16, "
          f"agreement {agreement:.4f} of {len(shown)} held-out images")  # fmt: skip
    assert top1[0] > 0.5, "a model that learned nothing would prove nothing"
    assert agreement >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("precision,least", [("fp16", 40.0), ("int8w", 25.0)])
@pytest.mark.parametrize(
    "name,size",
    [
        ("mobilevit_s", 256),
        ("efficientvit_b1", 224),
        ("vit_small_patch16_224", 224),
        ("swin_tiny_patch4_window7_224", 224),
    ],
)
def test_full_size_parity(name: str, size: int, precision: str, least: float, tmp_path: Path) -> None:
    """Issue 6: merged models against eager on real images (random weights); prints the figures."""
    torch.manual_seed(0)
    model = edge_ibtm.insert_mergers(edge_ibtm.build_model(name, num_classes=10), merger="ibtm", keep_ratio=0.7)
    shown = photographs(size)
    options = CoreMLOptions(precision, mean=MEAN, std=STD)
    artifact = lower_coreml(randomised(model), normalised(shown[:1]), tmp_path / "m.mlpackage", options)
    wanted, got = reference(model, shown), run_mlpackage(artifact.path, shown)
    agreement = float((wanted.argmax(1) == got.argmax(1)).float().mean())
    print(f"{name} {precision}: {sqnr(wanted, got):.1f} dB, top-1 agreement {agreement:.3f} of {len(shown)} images, "
          f"{artifact.bytes / 1e6:.1f} MB, {artifact.delegated} operations")  # fmt: skip
    assert sqnr(wanted, got) >= least
    assert precision != "fp16" or agreement >= 0.99

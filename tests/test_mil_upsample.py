"""Bilinear upsampling in ML Programs: MobileViT has it where its patches do not divide a feature map (96, 224 pixels)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coreml_models import MEAN, STD, digits, normalised, randomised, reference, sqnr
from torch import nn

import edge_ibtm
from edge_ibtm.targets.coreml import CoreMLOptions, lower_coreml, package_facts, run_mlpackage
from edge_ibtm.targets.mil_args import Args
from edge_ibtm.targets.mil_eval import OPERATIONS

IMAGE = torch.randn(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))


def upsampled(x: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return OPERATIONS["upsample_bilinear"](Args("upsample_bilinear", {"x": x, **inputs}, ("fp32",)))


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("height,width", [(7, 10), (8, 12), (21, 5), (1, 7), (50, 1)])
def test_operation_equals_torch(height: int, width: int, corners: bool) -> None:
    scales = {"scale_factor_height": (height + 1e-4) / 7, "scale_factor_width": (width + 1e-4) / 10}  # as coremltools does
    got = upsampled(IMAGE, **scales, align_corners=corners)
    wanted = F.interpolate(IMAGE, (height, width), mode="bilinear", align_corners=corners)
    assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-5)


def test_defaults_sizes_and_positions_are_core_mls() -> None:
    assert torch.equal(upsampled(IMAGE), IMAGE)
    doubled = upsampled(IMAGE, scale_factor_height=2, scale_factor_width=2)
    assert torch.allclose(doubled, F.interpolate(IMAGE, (14, 20), mode="bilinear", align_corners=True), atol=1e-5)
    narrow = upsampled(IMAGE, scale_factor_width=torch.tensor(0.7), align_corners=False)
    assert narrow.shape == (2, 3, 7, 7)  # 7.0 in single precision, as coremltools declares it
    line = torch.tensor([[[0.0, 1.0]]])  # the table in coremltools' documentation
    for corners, centres, wanted in (
        (False, True, [0.0, 0.1, 0.5, 0.9, 1.0]),
        (True, False, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (False, False, [0.0, 0.4, 0.8, 1.0, 1.0]),
    ):
        got = upsampled(line, scale_factor_width=2.5, align_corners=corners, half_pixel_centers=centres)
        assert torch.allclose(got[0, 0], torch.tensor(wanted))
    with pytest.raises(ValueError, match="both true"):
        upsampled(line, scale_factor_width=2, align_corners=True, half_pixel_centers=True)


class Resizes(nn.Module):
    """What MobileViT's block does around its transformer, alone."""

    def __init__(self, corners: bool) -> None:
        super().__init__()
        self.corners, self.head = corners, nn.Linear(3 * 5 * 5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, size=(8, 6), mode="bilinear", align_corners=self.corners)
        return self.head(F.interpolate(x.square(), size=(5, 5), mode="bilinear", align_corners=self.corners).flatten(1))


@pytest.mark.parametrize("corners", [False, True])
def test_package_equals_eager(corners: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Resizes(corners).eval(), torch.randn(4, 3, 5, 5)
    path = lower_coreml(model, x[:1], tmp_path / "m.mlpackage", CoreMLOptions("fp32")).path
    assert package_facts(path).operations["upsample_bilinear"] == 2
    with torch.no_grad():
        assert sqnr(model(x), run_mlpackage(path, x)) >= 100


@pytest.mark.slow
def test_mobilevit_where_its_patches_do_not_divide(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = edge_ibtm.build_model("mobilevit_xxs", num_classes=5, img_size=96)
    merged = randomised(edge_ibtm.insert_mergers(model, merger="ibtm", keep_ratio=0.7))
    shown = digits(96, 8)
    path = lower_coreml(merged, normalised(shown[:1]), tmp_path / "m.mlpackage", CoreMLOptions(mean=MEAN, std=STD)).path
    assert package_facts(path).operations["upsample_bilinear"] == 2
    wanted, got = reference(merged, shown), run_mlpackage(path, shown)
    print(f"mobilevit_xxs at 96 px: {sqnr(wanted, got):.1f} dB")
    assert sqnr(wanted, got) >= 40
    assert torch.equal(got.argmax(1), wanted.argmax(1))

"""Lowering, loading, running, verifying and pre-flight, on tiny models, in the real runtime."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from edge_ibtm import insert_mergers
from edge_ibtm.backbones import BACKBONES
from edge_ibtm.check import check
from edge_ibtm.cli import app
from edge_ibtm.errors import EdgeIBTMError, GateError, UsageError
from edge_ibtm.quantize import quantize
from edge_ibtm.targets import TARGETS, lower
from edge_ibtm.targets.lean import lean
from edge_ibtm.targets.runtime import load_pte, missing_kernels, operators_of, run_isolated, run_pte
from edge_ibtm.verify import Limits, compare_outputs, runner_of, verify


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return BACKBONES["vit"].twin()


@pytest.fixture(scope="module")
def lowered(vit, tmp_path_factory):
    model, size = vit
    return lower(model, torch.randn(1, 3, size, size), tmp_path_factory.mktemp("pte") / "vit.pte")


def test_artifact_says_what_it_is(lowered):
    assert lowered.bytes == lowered.path.stat().st_size > 10_000
    assert lowered.sha256 == hashlib.sha256(lowered.path.read_bytes()).hexdigest()
    assert lowered.subgraphs == 1 and lowered.delegated > 50 and lowered.non_delegated == 0
    assert missing_kernels(lowered.path) == []


@pytest.mark.parametrize(
    ("name", "merger"),
    [
        ("efficientvit", None),
        ("vit", "ibtm"),
        *(pytest.param(n, m, marks=pytest.mark.slow) for n, m in (
            ("mobilevit", None), ("swin", None), ("mobilevit", "ibtm"), ("swin", "ibtm"), ("efficientvit", "ibtm")
        )),
    ],
)  # fmt: skip
def test_families_lower_to_one_subgraph_and_compute_the_same(name, merger, tmp_path):
    torch.manual_seed(1)
    model, size = BACKBONES[name].twin()
    if merger:
        insert_mergers(model, merger=merger, keep_ratio=0.7)
    artifact = lower(model, torch.randn(1, 3, size, size), tmp_path / "m.pte")
    assert artifact.subgraphs == 1 and artifact.non_delegated <= 12, artifact.left_out
    verdict = verify(model, artifact, torch.randn(2, 3, size, size))
    assert verdict.ok and verdict.sqnr_db >= 100


def test_verify_sees_a_changed_model(vit, lowered):
    model, size = vit
    images = torch.randn(3, 3, size, size)
    assert verify(model, lowered, images).sqnr_db >= 100
    other, _ = BACKBONES["vit"].twin()
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        other.head.weight[0].add_(0.1 * torch.randn_like(other.head.weight[0]))
    verdict = verify(other, lowered.path, [images[:2], images[2:]])
    assert not verdict.ok and verdict.samples == 3 and "sqnr_db" in verdict.failures[0]
    with pytest.raises(GateError, match="sqnr_db"):
        verdict.require()


def test_one_image_far_off_rules_the_total_not_the_median():
    wanted = torch.ones(3, 4)
    got = wanted + torch.tensor([[1e-3], [1e-3], [0.1]])
    verdict = compare_outputs(wanted, got, Limits(sqnr_db=None, sqnr_median_db=50, top1_agreement=1))
    assert verdict.sqnr_median_db == pytest.approx(60, abs=0.01) and verdict.sqnr_lowest_db == pytest.approx(20, abs=0.01)
    assert verdict.ok and verdict.sqnr_db == pytest.approx(24.77, abs=0.01)
    assert compare_outputs(wanted, got, Limits(sqnr_median_db=61)).failures[0].startswith("sqnr_db 24.77")


def test_compare_outputs():
    wanted = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    got = torch.tensor([[2.0, 1.0], [3.0, 0.0]])
    verdict = compare_outputs(wanted, got, Limits(sqnr_db=8, max_abs=0.5, top1_agreement=0.9))
    assert verdict.sqnr_db == pytest.approx(10 * torch.log10(torch.tensor(14 / 2)).item())
    assert verdict.max_abs == 1.0 and verdict.top1_agreement == 0.5
    assert len(verdict.failures) == 2
    broken = compare_outputs(wanted, got * float("nan"), Limits(sqnr_db=None, sqnr_median_db=1))
    assert not broken.ok and len(broken.failures) == 2 and broken.sqnr_db != broken.sqnr_db
    same = compare_outputs(wanted, wanted, Limits())
    assert same.ok and same.sqnr_db == same.sqnr_median_db == same.sqnr_lowest_db == 200
    with pytest.raises(UsageError, match="shape"):
        compare_outputs(wanted, got[:, :1], Limits())


def test_bad_files_and_inputs(lowered, tmp_path):
    x = torch.randn(1, 3, 32, 32)
    foreign, short = tmp_path / "foreign.pte", tmp_path / "short.pte"
    foreign.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    short.write_bytes(lowered.path.read_bytes()[: lowered.bytes // 2])
    bad = ((tmp_path / "none.pte", "no such file"), (foreign, "not an ExecuTorch program"), (short, "cut short"))
    for path, message in bad:
        with pytest.raises(UsageError, match=message):
            run_pte(path, x)
    with pytest.raises(UsageError, match=r"shape \(1, 3, 32, 31\)"):
        run_pte(lowered.path, x[..., :31])
    with pytest.raises(UsageError, match="torch.float64, the artifact takes .* torch.float32"):
        run_pte(lowered.path, x.double())
    with pytest.raises(UsageError, match="1 inputs, got 2"):
        run_pte(lowered.path, (x, x))
    with pytest.raises(UsageError, match="must be a tensor"):
        lower(nn.Linear(2, 2), [[1.0]], tmp_path / "x.pte")
    for integers in (x.to(torch.uint8), (x.long(),)):
        with pytest.raises(UsageError, match=r"floating point, got torch.\w+ of shape \(1, 3, 32, 32\).*normalise"):
            lower(nn.Conv2d(3, 2, 1), integers, tmp_path / "x.pte")
    with pytest.raises(UsageError, match="xnnpack"):
        lower(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / "x.pte", target="xnpack")
    with pytest.raises(UsageError, match="the artifact takes"):  # not what the model says of them
        verify(nn.Linear(9, 9), lowered.path, x[..., :31])
    with pytest.raises(UsageError, match=r"\.pte, \.pt2 or \.mlpackage"):
        verify(nn.Identity(), tmp_path / "x.onnx", x)


@pytest.mark.parametrize(
    ("name", "target", "suffix"),
    [("x.pte", "torch", ".pt2"), ("x", "xnnpack", ".pte"), ("x.pte", "coreml", ".mlpackage")],
)
def test_an_artifact_has_the_suffix_of_its_target(name, target, suffix, tmp_path):
    with pytest.raises(UsageError, match=f"target {target} writes {suffix} files, not '{name}'"):
        lower(nn.Linear(2, 2), torch.randn(1, 2), tmp_path / name, target=target)
    assert not list(tmp_path.iterdir())


def test_weights_of_a_program_go_with_its_last_reference(lowered):
    gc.disable()
    try:
        loaded = load_pte(lowered.path)
        program = weakref.ref(loaded.program)
        del loaded
        assert program() is None
    finally:
        gc.enable()


def test_many_images_one_by_one_load_a_program_once(lowered, monkeypatch):
    loads = []
    monkeypatch.setattr("edge_ibtm.targets.runtime.load_pte", lambda path: loads.append(path) or load_pte(path))
    run = runner_of(lowered.path)
    images = torch.randn(4, 3, 32, 32)
    together = run(images)
    assert torch.equal(torch.cat([run(image[None]) for image in images]), together)
    assert loads == [lowered.path]


def test_a_damaged_program_does_not_take_the_interpreter_along(lowered, tmp_path):
    content = bytearray(lowered.path.read_bytes())
    content[64:4096] = b"\xff" * (4096 - 64)
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes(content)
    with pytest.raises(EdgeIBTMError):
        run_isolated(damaged, torch.randn(1, 3, 32, 32))


class Sorts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(x.flatten(1), dim=-1).values * 2


def test_a_failed_lowering_names_the_pass(tmp_path, monkeypatch):
    from executorch.exir.passes.const_prop_pass import ConstPropPass

    def broken(self, module):
        raise ValueError("no such constant")

    monkeypatch.setattr(ConstPropPass, "call", broken)
    with pytest.raises(EdgeIBTMError, match="lowering to xnnpack failed in ConstPropPass: no such constant"):
        lower(nn.Flatten(), torch.randn(1, 3, 2, 2), tmp_path / "m.pte")
    assert not list(tmp_path.iterdir())


def test_check_finds_missing_kernels():
    found = check(Sorts(), torch.randn(1, 3, 4, 4))
    assert any("sort" in name for name in found.missing) and not found.ok
    assert any("hint" in line for line in found.lines())
    with pytest.raises(EdgeIBTMError, match="sort"):
        found.require(allow_fallback=True)


def test_check_accepts_what_is_delegated(vit):
    model, size = vit
    found = check(model, torch.randn(1, 3, size, size)).require()
    assert found.ok and found.artifact.subgraphs == 1 and found.left_out == {}


class Counts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x.flatten(1) * 2, -1) + 1


def test_check_names_what_stays_outside():
    found = check(Counts(), torch.randn(1, 3, 4, 4))
    assert found.ok and any("cumsum" in name for name in found.left_out)
    assert found.artifact.non_delegated == sum(found.artifact.left_out.values()) > 0  # no getitem, which nothing executes
    with pytest.raises(EdgeIBTMError, match="cumsum.*--allow-fallback"):
        found.require()
    assert found.require(allow_fallback=True) is found


def test_portable_and_torch_targets_run(vit, tmp_path):
    model, size = vit
    x = torch.randn(1, 3, size, size)
    portable = lower(model, x, tmp_path / "p.pte", target="portable")
    assert portable.subgraphs == 0 and "aten::bmm.out" in operators_of(portable.path)
    assert verify(model, portable, x).sqnr_db >= 100
    plain = lower(model, x, tmp_path / "p.pt2", target="torch")
    assert verify(model, plain, torch.cat([x, 2 * x])).sqnr_db >= 100
    (tmp_path / "foreign.pt2").write_bytes(b"nothing")
    for name, message in (("foreign", "no exported program"), ("none", "no such file")):
        with pytest.raises(UsageError, match=message):
            verify(model, tmp_path / f"{name}.pt2", x)
    with pytest.raises(UsageError, match=r"p.pt2 does not take images of \[1, 3, 16, 16\]"):
        runner_of(plain.path)(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int8_dynamic", marks=pytest.mark.slow)])
def test_the_portable_target_runs_8_bit_graphs(vit, scheme, tmp_path):
    model, size = vit
    x = torch.randn(1, 3, size, size)
    graph = quantize(model, [x], scheme=scheme)
    artifact = lower(graph, x, tmp_path / "p.pte", target="portable")
    assert missing_kernels(artifact.path) == [] and verify(graph, artifact, x).sqnr_db >= 100


def test_all_images_of_a_verification_go_through_one_process(vit, lowered, monkeypatch):
    started = []
    monkeypatch.setattr("edge_ibtm.targets.runtime.run_isolated", lambda *given: started.append(given) or run_isolated(*given))
    model, size = vit
    assert verify(model, lowered, list(torch.randn(3, 1, 3, size, size)), isolated=True).samples == 3
    assert len(started) == 1


def test_lean_leaves_no_trace():
    from executorch.exir import pass_base
    from torch._export.verifier import Verifier
    from torch.fx import GraphModule, traceback

    owners = ((pass_base._ExportPassBase, "call"), (Verifier, "check"), (GraphModule, "recompile"), (traceback, "copy"))
    before = [getattr(owner, name) for owner, name in owners]
    with pytest.raises(ValueError), lean():
        assert all(getattr(owner, name) is not old for (owner, name), old in zip(owners, before))
        raise ValueError
    assert all(getattr(owner, name) is old for (owner, name), old in zip(owners, before))


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_folder_is_never_replaced(target, tmp_path):
    folder = tmp_path / f"mine{TARGETS[target].suffix}"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="mine"):
        lower(nn.Flatten(), torch.zeros(1, 3, 4, 4), folder, target=target)
    assert [p.name for p in tmp_path.rglob("*")] == [folder.name, "photo.jpg"]


def test_cli_reports_bad_files(tmp_path, lowered):
    runner = CliRunner()
    foreign = tmp_path / "foreign.pte"
    foreign.write_bytes(b"nothing of the kind, and long enough for a header")
    result = runner.invoke(app, ["verify", str(foreign), "--arch", "riscv"])
    assert isinstance(result.exception, UsageError) and "riscv" in str(result.exception)
    result = runner.invoke(app, ["verify", str(lowered.path)])
    assert isinstance(result.exception, UsageError) and "--model" in str(result.exception)
    result = runner.invoke(app, ["check", "--model", "mobilevit_s", "--target", "xnpack"])
    assert isinstance(result.exception, UsageError) and "xnnpack" in str(result.exception)


@pytest.mark.slow
def test_cli_lower_then_verify(tmp_path):
    runner, path = CliRunner(), tmp_path / "m.pte"
    common = ["--model", "mobilevit_xxs", "--classes", "3", "--img-size", "64", "--weights"]
    weights = tmp_path / "w.safetensors"
    from safetensors.torch import save_file

    from edge_ibtm import build_model

    save_file(build_model("mobilevit_xxs", num_classes=3).state_dict(), weights)
    result = runner.invoke(app, ["lower", *common, str(weights), "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output.splitlines()[-1])["subgraphs"] == 1
    result = runner.invoke(app, ["verify", str(path), *common, str(weights)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output.splitlines()[-1])["sqnr_db"] > 100


class Resizes(nn.Module):
    """Two bilinear resizes around a convolution, as MobileViT does on maps that are no multiple of its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.interpolate(self.conv(x), size=(6, 8), mode="bilinear", align_corners=False)
        return nn.functional.interpolate(torch.relu(y), size=(5, 7), mode="bilinear", align_corners=False)


def test_resizing_is_delegated(tmp_path):
    torch.manual_seed(3)
    model, x = Resizes().eval(), torch.randn(1, 3, 5, 7)
    artifact = lower(model, x, tmp_path / "r.pte")
    assert artifact.subgraphs == 1 and artifact.left_out == {}
    assert verify(model, artifact, x).sqnr_db >= 100


class Parts(nn.Module):
    """Constants that are parts of larger tensors: a buffer, rows and columns of a parameter, rows of a constant."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.randn(9, 6)[3:])
        self.weight = nn.Parameter(torch.randn(6, 12))

    def forward(self, x):
        first, second = self.weight.split(3)
        picked = nn.functional.linear(x, torch.eye(6)[4:])
        x = nn.functional.linear(x, self.rows) @ self.weight[:, 6:]
        return x.sum(-1, keepdim=True) * picked, x @ first.T[:6], x @ second.T[6:]


@pytest.mark.parametrize("target", ["xnnpack", "portable"])
def test_parts_of_larger_tensors_are_written_whole(target, tmp_path):
    torch.manual_seed(0)
    model, x = Parts().eval(), torch.randn(4, 6)
    lower(model, x, tmp_path / "m.pte", target=target)
    for got, wanted in zip(run_pte(tmp_path / "m.pte", x), model(x)):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)

"""Options with values that cannot be, or that do not apply, are refused before any work: exit code 2, one line."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from edge_ibtm import cli, cli_targets
from edge_ibtm.errors import GateError, UsageError
from edge_ibtm.targets import Artifact
from edge_ibtm.verify import Limits, Verdict, verify


def refusal(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must exit with 2 says on stderr."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    err = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize("command", ["check", "lower -o x.pt2", "verify x.pt2"])
def test_no_classes_and_no_pixels(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = [*command.split(), "--model", "mobilevit_xxs"]
    assert "num_classes is 0; give at least 1" in refusal(*model, "--classes", "0", capsys=capsys)
    assert "img_size is -64; give at least 1" in refusal(*model, "--img-size", "-64", capsys=capsys)


@pytest.mark.parametrize("option", ["--img-size", "--images"])
def test_ib_of_no_pixels_or_no_images(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert option in refusal("ib", option, "0", capsys=capsys)


@pytest.mark.parametrize("command", ["check", "lower -o x.pt2", "verify x.pt2", "probe --target torch"])
def test_a_merger_alone_or_unknown(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = [*command.split(), "--model", "mobilevit_xxs"]
    assert "--merger tome+drop merges nothing" in refusal(*model, "--merger", "tome+drop", capsys=capsys)
    for more in ([], ["--keep-ratio", "0.7"]):
        assert "did you mean 'ibtm'" in refusal(*model, "--merger", "ibmt", *more, capsys=capsys)


@pytest.mark.parametrize(
    "option", ["--weights w.pth", "--classes 3", "--img-size 64", "--keep-ratio 0.7", "--merger tome"]
)
def test_verify_takes_no_half_described_model(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refusal("verify", "runs/merged.pte", *option.split(), capsys=capsys)
    assert f"{option.split()[0]}: these describe the model that --model names" in err


def test_verify_counts_images_in_run_directories_only(capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("--model mobilevit_xxs", "--inputs x.pt", "--arch aarch64"):
        assert "--images: counts held-out" in refusal("verify", "m.pte", "--images", "3", *place.split(), capsys=capsys)
    for count in ("0", "-1"):
        assert f"images is {count}; give at least 1" in refusal("verify", "m.pte", "--images", count, capsys=capsys)
    assert "--min-sqnr" in refusal("verify", "m.pte", "--arch", "aarch64", "--min-sqnr", "3", capsys=capsys)


def test_verify_without_any_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.zeros(0, 3, 64, 64), tmp_path / "none.pt")
    err = refusal("verify", "m.pte", "--model", "mobilevit_xxs", "--inputs", str(tmp_path / "none.pt"), capsys=capsys)
    assert "none.pt holds no image: its tensor is [0, 3, 64, 64]" in err
    with pytest.raises(UsageError, match="at least one image"):
        verify(torch.nn.Identity(), tmp_path / "m.pte", torch.zeros(0, 3, 64, 64))


def test_random_weights_are_told_and_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `lower` wrote without weights, `verify` with the same options builds again."""
    seen: list[torch.nn.Module] = []

    def keep(model: torch.nn.Module, *_: object, **__: object) -> Artifact:
        seen.append(model)
        return Artifact(tmp_path, "torch", 1, 0, 0, 1, "")

    monkeypatch.setattr("edge_ibtm.targets.lower", keep)
    monkeypatch.setattr(cli_targets, "_compare", keep)
    common = ["--model", "mobilevit_xxs", "--classes", "3", "--img-size", "64", "--keep-ratio", "0.7"]
    for command in (["lower", "-o", "x.pte"], ["verify", "x.pt2"]):
        torch.seed()
        with pytest.raises(SystemExit) as left:
            cli.main([*command, *common])
        assert left.value.code == 0 and "weights are random (seed 0)" in capsys.readouterr().err
    first, second = (model.state_dict() for model in seen)
    assert all(torch.equal(first[key], second[key]) for key in first | second)


def test_figures_that_are_no_numbers_are_null_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = float("nan")
    verdict = Verdict(nan, nan, nan, nan, float("inf"), 1.0, 1, ok=False, failures=("sqnr_db nan is below 80",))
    monkeypatch.setattr(import_module("edge_ibtm.verify"), "verify", lambda *_, **__: verdict)
    with pytest.raises(GateError):
        cli_targets._compare(torch.nn.Identity(), Path("m.pte"), torch.zeros(1, 3, 4, 4), Limits(), "images")
    found = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert found["sqnr_db"] is None and found["max_abs"] is None
    assert found["top1_agreement"] == 1 and found["ok"] is False


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("x.pte", "--expected y.pt | --keep-ratio 0.7 | --merger tome | --compile"),
        ("x.pte", "--cores big | --max-temperature 40 | --runner r"),
        ("x.pte --device android", "--keep-ratio 0.7 | --merger tome | --compile"),
        ("x.mlpackage --device mac", "--expected y.pt | --threads 2 | --profile | --cores big | --runner r"),
        ("x.mlpackage --device ios", "--expected y.pt | --threads 2 | --max-temperature 40"),
        ("--target torch --model mobilevit_xxs", "--expected y.pt | --cores big | --max-temperature 40 | --runner r"),
        ("--import log.txt", "--model mobilevit_xxs | --threads 2 | --profile"),
        ("--import log.txt", "--device mac | --target cuda | --samples 9 | --warmup 9 | --seconds 9"),
    ],
)
def test_probe_refuses_what_means_nothing_there(place: str, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in options.split(" | "):
        err = refusal("probe", *place.split(), *option.split(), capsys=capsys)
        assert f"error: {option.split()[0]}: no meaning for" in err
        assert ("edge-ibtm verify" in err) == ("--expected" in option)

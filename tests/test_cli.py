"""The command line as a person meets it: help, recipes, bad input, exit codes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from edge_ibtm import build_model, cli, pipeline, stages
from edge_ibtm.checkpoint import MergeSpec, ModelSpec, build, load_into, read_state, save_state
from edge_ibtm.cli_compress import choose_recipe
from edge_ibtm.cli_targets import _build
from edge_ibtm.config import parse_recipe
from edge_ibtm.errors import EdgeIBTMError, GateError, UsageError


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    code = left.value.code
    return (code if isinstance(code, int) else 0), out, err


def test_help_answers_without_torch() -> None:
    code = "import sys, edge_ibtm.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compress" in done.stdout and "recipe" in done.stdout and done.stdout.strip().endswith("False")


def test_recipe_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert "mobilevit_s" in run("recipe", "ls", capsys=capsys)[1]
    assert run("recipe", "cat", "smoke", capsys=capsys)[1].startswith("#")
    assert run("recipe", "validate", "smoke", "merge.keep_ratio=0.5", capsys=capsys)[0] == 0
    code, _, err = run("recipe", "validate", "smoke", "model.name=mobilvit_s", "merge.merger=tome+dorp",
                       "lower.targets=xnnpack,corml", "probe.device=andriod", capsys=capsys)  # fmt: skip
    assert code == 2
    for path, name in (("model.name", "mobilevit_s"), ("merge.merger", "drop"), ("lower.targets", "coreml"),
                       ("probe.device", "android")):  # fmt: skip
        assert any(path in line and f"did you mean '{name}'" in line for line in err.splitlines()), (path, err)
    assert json.loads(run("recipe", "schema", capsys=capsys)[1])["title"] == "Recipe"


def test_list_shows_models_mergers_targets(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("list", capsys=capsys)
    assert code == 0
    for name in ("mobilevit_s", "efficientvit_b1", "ibtm", "tome", "xnnpack", "coreml"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mobilvit_s"], "did you mean 'mobilevit_s'"),
        (["--merger", "ibmt"], "did you mean 'ibtm'"),
        (["--target", "xnpack"], "did you mean 'xnnpack'"),
        (["--keep-ratio", "0"], "merge.keep_ratio"),
        (["--keep-ratio", "many"], "merge.keep_ratio"),
        (["--keep-ratio", "1.2", "--epochs", "-1"], "2 faults"),
        (["merge.kep=1"], "unknown key"),
        (["data.augment.scale=[2,1]"], "the smaller first, not [2.0, 1.0]"),
        (["finetune.lr=.inf", "verify.fp32_sqnr_db=.nan"], "2 faults"),
        (["--out", f"{__file__}/sub"], "test_cli.py is a file; give the name of a folder"),
        (["--recipe", "nothing_like_it"], "no recipe"),
        (["--data", "/no/such/folder"], "no data at '/no/such/folder'"),
        (["--weights", "/no/such.pth"], "no weights file"),
        (["--epochs"], ""),
        (["--model", "mobilevit_s", "--merger", "evit"], "evit"),
        (["--model", "vit_tiny_patch16_224", "merge.density=progressive"], "density"),
        (["merge.macs=0.01"], "0.01"),
        (["--device", "andriod"], "did you mean 'android"),
        (["--device", "cuda"], "runs no .pte"),
    ],
)
def test_bad_requests_exit_2_with_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("compress", "--out", str(tmp_path / "run"), *arguments, capsys=capsys)
    assert code == 2 and message in err and "Traceback" not in err


def test_debug_keeps_the_traceback() -> None:
    with pytest.raises(UsageError):
        cli.main(["compress", "--debug", "--recipe", "nothing_like_it"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "no space left on the device at '/x/y'"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "choose another --out"),
        (KeyboardInterrupt(), 130, "the same command resumes"),
        (GateError("1 gate missed: x"), 1, "1 gate missed"),
        (EdgeIBTMError("lowering broke"), 1, "lowering broke"),
        (RuntimeError("surprise\nsecond line"), 1, "RuntimeError: surprise (run again with --debug"),
    ],
)
def test_failures_are_one_line(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "compress", fail)
    left, _, err = run("compress", "--recipe", "smoke", capsys=capsys)
    assert left == code and message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 2, "what recipe was chosen, and the message"


def test_options_become_recipe_values() -> None:
    chosen, why = choose_recipe({"model": "mobilevit_s", "keep_ratio": "0.5", "target": "xnnpack"}, None, ["seed=3"])
    assert (chosen.merge.keep_ratio, chosen.lower.targets, chosen.seed) == (0.5, ("xnnpack",), 3)
    assert chosen.model.img_size is not None and "demo" in why
    own, why = choose_recipe({"model": "mobilevit_s", "data": "folder"}, None, [])
    assert own.model.img_size is None and "general settings" in why
    assert choose_recipe({}, None, ["model.name=efficientvit_b1"])[1].startswith("recipe efficientvit_b1.yaml")
    budget, _ = choose_recipe({"macs": "0.8"}, "mobilevit_s", [])
    assert budget.merge.macs == 0.8, "it takes the place of the recipe's keep_ratio"
    with pytest.raises(UsageError, match=r"merge\.macs is 0\.8 and merge\.keep_ratio is 0\.5"):
        choose_recipe({"keep_ratio": "0.5"}, None, ["merge.macs=0.8"])
    other, _ = choose_recipe({"model": "vit_tiny_patch16_224"}, None, [])
    assert other.model.name == "vit_tiny_patch16_224"


def test_interrupt_of_a_real_run_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_ibtm.cli", "compress", "--recipe", "smoke", "--out", str(tmp_path)]
    command += ["base.epochs=200", "base.checkpoint_seconds=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for _ in range(600):
        if list(tmp_path.glob("stages/base-*.partial/scratch/checkpoints/checkpoint.pt")):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command resumes" in err and "Traceback" not in err
    assert list(tmp_path.glob("stages/base-*.partial/scratch/checkpoints/checkpoint.pt"))
    assert not list(tmp_path.glob("*.pte"))


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.system, (f"touch {tmp_path}/owned",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(UsageError, match="refused"):
            read_state(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("text.safetensors", "text.pth", "list.pth"):
        with pytest.raises(UsageError, match=name):
            read_state(tmp_path / name)


def test_checkpoint_of_another_architecture_says_what_differs() -> None:
    model = build(ModelSpec("mobilevit_xxs", 10, 64))
    state = dict(model.state_dict())
    with pytest.raises(UsageError, match=r"1 keys missing.*1 keys unexpected"):
        load_into(model, {**{k: v for k, v in state.items() if k != "stem.conv.weight"}, "odd": torch.ones(1)}, "f")
    with pytest.raises(UsageError, match=r"1 shapes differ.*stem\.conv\.weight.*\[1\]"):
        load_into(model, {**state, "stem.conv.weight": torch.ones(1)}, "f")


def test_checkpoint_of_another_class_count_offers_a_new_head() -> None:
    model, other = build(ModelSpec("mobilevit_xxs", 10, 64)), build(ModelSpec("mobilevit_xxs", 7, 64))
    with pytest.raises(UsageError, match=r"7 classes, not 10: give --classes 7 .*new_head"):
        load_into(model, other.state_dict(), "f")
    load_into(model, other.state_dict(), "f", new_head=True)
    assert torch.equal(model.stem.conv.weight, other.stem.conv.weight)
    assert model.head.fc.out_features == 10


def test_weights_of_a_merged_model_are_told_from_another_architecture(tmp_path: Path) -> None:
    file, named = tmp_path / "merged.safetensors", {"name": "mobilevit_xxs", "img_size": 64}
    save_state(build(ModelSpec("mobilevit_xxs", 10, 64, MergeSpec("ibtm", 0.7))), file)
    for refused in (
        lambda: build_model("mobilevit_xxs", num_classes=10, weights=file),
        lambda: _build("mobilevit_xxs", str(file), 10, 64, (None, None)),
        lambda: _build("mobilevit_xxs", str(file), 10, 64, ("tome", 0.7)),
        lambda: stages.preflight(parse_recipe({"model": {**named, "weights": str(file)}})),
    ):
        with pytest.raises(UsageError, match=r"merged\.safetensors' are those of a merged model"):
            refused()
    _build("mobilevit_xxs", str(file), 10, 64, (None, 0.7))


def test_weights_survive_a_round_trip_with_wrappers_and_prefixes(tmp_path: Path) -> None:
    spec = ModelSpec("mobilevit_xxs", 10, 64)
    model = build(spec)
    save_state(model, tmp_path / "w.safetensors")
    again = build(spec, tmp_path / "w.safetensors")
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(image), again(image))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth")
    assert set(read_state(tmp_path / "w.pth")) == set(model.state_dict())


def test_full_disk_while_saving_weights_leaves_no_half_file(tmp_path: Path) -> None:
    target = tmp_path / "w.safetensors"
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from edge_ibtm.checkpoint import save_state\n"
        "from edge_ibtm.errors import EdgeIBTMError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: save_state(torch.nn.Linear(1000, 10), Path(sys.argv[1]))\n"
        "except (EdgeIBTMError, OSError) as e: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr
    assert list(tmp_path.iterdir()) == []

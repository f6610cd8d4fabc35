"""Options with values that cannot be, or that do not apply, are refused before any work: exit code 2, one line that names
them."""

from __future__ import annotations

import pytest

from edge_ibtm import cli


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

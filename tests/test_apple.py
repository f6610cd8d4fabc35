"""The Apple driver: command lines and parsing.

The outputs below are handwritten: no Mac was at hand to record one. Their form is what public users of the tools
show: the JSON of `devicectl list devices` as Flutter's tests hold it (flutter_tools/test/.../core_devices_test.dart),
with a watch in the list as devicectl reports one that is paired with the phone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_ibtm.errors import DeviceError, UsageError
from edge_ibtm.probe import ProbeOptions, apple, probe

DEVICES = {
    "info": {"outcome": "success", "version": "397.21"},
    "result": {
        "devices": [
            {
                "identifier": "AAAA-1",
                "connectionProperties": {"pairingState": "paired", "tunnelState": "disconnected"},
                "deviceProperties": {"name": "Ada's iPhone", "osVersionNumber": "17.4", "developerModeStatus": "enabled"},
                "hardwareProperties": {"marketingName": "iPhone 15 Pro", "platform": "iOS", "udid": "00008130-01"},
            },
            {
                "identifier": "CCCC-3",
                "connectionProperties": {"pairingState": "paired", "tunnelState": "connected"},
                "deviceProperties": {"name": "Ada's Watch", "osVersionNumber": "10.4"},
                "hardwareProperties": {"platform": "watchOS", "deviceType": "appleWatch"},
            },
            {
                "identifier": "BBBB-2",
                "connectionProperties": {"pairingState": "paired", "tunnelState": "unavailable"},
                "deviceProperties": {"name": "Old", "osVersionNumber": "16.1", "developerModeStatus": "enabled"},
                "hardwareProperties": {"productType": "iPhone10,4"},
            },
        ]
    },
}  # fmt: skip
REPORT = {
    "runner": "edge_ibtm_runner",
    "models": [{"load_ms": 80.0, "first_ms": 9.0, "warmup_runs": 3, "samples_ms": [1.5, 1.6, 1.4]}],
}


class Xcode:
    """Answers commands as Xcode would, and remembers them."""

    def __init__(self, console: str) -> None:
        self.console, self.commands = console, []

    def __call__(self, command: list[str]) -> str:
        self.commands.append(command)
        if "list" in command:
            Path(command[-1]).write_text(json.dumps(DEVICES))
        return self.console if "launch" in command else ""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    made = tmp_path / "my model.mlpackage"
    made.mkdir()
    return made


def test_commands_in_order(package: Path, tmp_path: Path) -> None:
    app = tmp_path / "Bench.app"
    app.mkdir()
    xcode = Xcode("Launched application\r\n" + json.dumps(REPORT) + "\r\n")  # a terminal ends lines with both
    run = apple.probe_ios([package], None, app, ProbeOptions(samples=30, warmup=4), xcode)
    tools = [command[1:5] for command in xcode.commands]
    assert tools[0][:3] == ["devicectl", "list", "devices"]
    assert tools[1] == ["devicectl", "device", "install", "app"]
    assert tools[2][:2] == ["coremlcompiler", "compile"]
    assert tools[3] == ["devicectl", "device", "copy", "to"]
    assert xcode.commands[3][-1] == "Documents/my model.mlmodelc", "a folder's contents land in the destination"
    launch = xcode.commands[4]
    assert launch[:5] == ["script", "-q", "-t", "0", "/dev/null"], "devicectl passes stdout on to a terminal only"
    assert launch[launch.index("--device") + 1] == "AAAA-1"
    assert launch[launch.index(apple.BUNDLE_ID) + 1 :] == [
        "--model_path", "my model.mlmodelc", "--json", "--warmup", "4", "--num_executions", "30",
    ]  # fmt: skip
    (result,) = run.results
    assert result.p50_ms == 1.5 and result.load_ms == 80 and result.device.name == "iPhone 15 Pro"
    assert result.device.kind == "apple" and "has not run on a device yet" in result.notes[0]


def test_an_app_that_prints_no_result(package: Path) -> None:
    phone = apple.parse_devices(json.dumps(DEVICES))[0]
    with pytest.raises(DeviceError, match="printed no result"):
        apple.parse_ios("App terminated due to signal 9.", "m", package, phone)


def test_a_failing_tool_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="xcrun is missing: install Xcode"):
        apple._xcrun(["xcrun", "devicectl"])
    xcrun = tmp_path / "xcrun"
    xcrun.write_text("#!/bin/sh\necho ERROR: device is locked >&2\nexit 1\n")
    xcrun.chmod(0o755)
    with pytest.raises(DeviceError, match="`xcrun devicectl device` failed: ERROR: device is locked"):
        apple._xcrun(["xcrun", "devicectl", "device"])


def test_choosing_a_phone() -> None:
    found = apple.parse_devices(json.dumps(DEVICES))
    assert [each.name for each in found] == ["Ada's iPhone", "Old"], "the watch is no iPhone"
    assert apple.choose_iphone(found, "00008130-01").identifier == "AAAA-1"
    assert apple.choose_iphone(found, None).name == "Ada's iPhone"
    with pytest.raises(DeviceError, match="Old is not reachable: connect the cable"):
        apple.choose_iphone(found, "Old")
    with pytest.raises(UsageError, match="no iPhone 'Eve'"):
        apple.choose_iphone(found, "Eve")
    with pytest.raises(UsageError, match="2 iPhones"):
        apple.choose_iphone([found[0], found[0]], None)
    with pytest.raises(DeviceError, match="no iPhone is ready: Old is not reachable"):
        apple.choose_iphone(found[1:], None)
    with pytest.raises(DeviceError, match="unknown form"):
        apple.parse_devices("{}")


@pytest.mark.skipif(apple.platform.system() == "Darwin", reason="this is a Mac")
def test_without_a_mac(package: Path) -> None:
    import torch

    with pytest.raises(UsageError, match="needs a Mac, this is Linux.*edge-ibtm verify"):
        probe(package, torch.zeros(1), device="mac")
    with pytest.raises(UsageError, match="no such file: .*x.pte"):
        probe(package.parent / "x.pte", torch.zeros(1), device="ios:Ada")
    (package.parent / "x.pte").touch()
    with pytest.raises(UsageError, match="is no .mlpackage"):
        probe(package.parent / "x.pte", torch.zeros(1), device="ios:Ada")

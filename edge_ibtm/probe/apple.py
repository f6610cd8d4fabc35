"""Latency of a `.mlpackage` on Apple hardware: in this process on a Mac, through `xcrun devicectl` on an iPhone.

mac   coremltools' `MLModel.predict`, timed like every other probe.
ios   finds the phone, compiles the model, installs the benchmark app, copies the model into its Documents, launches it
      with --console and reads its output: the runner's JSON line.

Nothing here has run on a device, and there is no recording of one either. Command lines and the form of the JSON follow
Apple's `--help` as public users of the tool show it (Flutter's flutter_tools/lib/src/ios/core_devices.dart, which also
found that `--console` passes the app's stdout on only to a terminal: hence `script`).
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edge_ibtm.errors import DeviceError, UsageError, suggest
from edge_ibtm.probe import facts
from edge_ibtm.probe.host import host_device
from edge_ibtm.probe.loop import ProbeOptions, sample_rounds, timed_ms, warm_up
from edge_ibtm.probe.results import latency_of, ratios, unique_labels
from edge_ibtm.probe.runner_json import parse_report
from edge_ibtm.probe.schema import Device, Latency, ProbeRun

BUNDLE_ID = "org.edge-ibtm.bench"
NOT_TRIED = "the iOS driver has not run on a device yet: check the first figures by hand"
Run = Callable[[list[str]], str]


@dataclass(frozen=True)
class IPhone:
    """One device as `devicectl list devices` tells it."""

    identifier: str
    name: str
    udid: str
    model: str
    os: str
    ready: bool
    why_not: str = ""


def probe_apple(
    paths: Sequence[Path],
    inputs: Sequence[Sequence[Any]] | None,
    device: str,
    options: ProbeOptions,
    app: Path | None = None,
) -> ProbeRun:
    """Probe `.mlpackage` files. device: mac, ios or ios:NAME. app: the benchmark .app, for ios.

    Errors: UsageError (not a Mac, not an .mlpackage, several phones), DeviceError (Xcode or the phone).
    """
    for path in paths:
        if not path.exists():
            raise UsageError(f"no such file: {path}; `edge-ibtm lower --target coreml` writes a .mlpackage")
        if path.suffix != ".mlpackage" or not path.is_dir():
            raise UsageError(f"{path} is no .mlpackage; lower with target coreml, or probe a .pte with --device host")
    if platform.system() != "Darwin":
        raise UsageError(
            f"--device {device} needs a Mac, this is {platform.system()}; the numbers can be checked here without one: "
            f"edge-ibtm verify {paths[0]}"
        )
    kind, _, name = device.partition(":")
    if kind == "mac":
        return _probe_mac(paths, inputs, options)
    return probe_ios(paths, name or None, app, options, _xcrun)


def _probe_mac(paths: Sequence[Path], inputs: Sequence[Sequence[Any]] | None, options: ProbeOptions) -> ProbeRun:
    import coremltools as ct

    models: list[Any] = []
    load = [timed_ms(partial(_open, models, path)) for path in paths]
    feeds = [_feed(model, inputs[i] if inputs else None) for i, model in enumerate(models)]
    runs = [partial(model.predict, feed) for model, feed in zip(models, feeds, strict=True)]
    first = [timed_ms(run) for run in runs]
    warm = [warm_up(run, options) for run in runs]
    before: dict[str, Any] = {"load": facts.load_average(), "mhz": (), "thermal": {}}
    samples = sample_rounds(runs, options)
    after: dict[str, Any] = {"load": facts.load_average(), "mhz": (), "thermal": {}}
    where = host_device(before, after)
    where = where.model_copy(update={"kind": "apple", "runtime": f"Core ML, coremltools {ct.__version__}"})
    results = [
        latency_of(
            path, label, where, samples[i], load_ms=load[i], first_ms=first[i], warmup_runs=warm[i][0],
            stable=warm[i][1], peak_rss_mb=facts.peak_rss_mb(), notes=("compute units: all",),
        )
        for i, (path, label) in enumerate(zip(paths, unique_labels([p.stem for p in paths]), strict=True))
    ]  # fmt: skip
    return ProbeRun(results=tuple(results), ratios=ratios(results))


def _open(models: list[Any], path: Path) -> None:
    import coremltools as ct

    models.append(ct.models.MLModel(str(path)))


def _feed(model: Any, given: Sequence[Any] | None) -> dict[str, Any]:
    """Inputs by name: images as PIL images, arrays as float32; grey or zero when none is given."""
    import numpy as np
    from PIL import Image

    feed: dict[str, Any] = {}
    for index, entry in enumerate(model.get_spec().description.input):
        if entry.type.WhichOneof("Type") == "imageType":
            size = (entry.type.imageType.width, entry.type.imageType.height)
            feed[entry.name] = Image.new("RGB", size, (128, 128, 128))
        else:
            shape = tuple(entry.type.multiArrayType.shape)
            feed[entry.name] = given[index].numpy() if given else np.zeros(shape, np.float32)
    return feed


def probe_ios(paths: Sequence[Path], name: str | None, app: Path | None, options: ProbeOptions, run: Run) -> ProbeRun:
    """Probe on an iPhone, one launch for each model. run: executes a command and returns its stdout."""
    phone = choose_iphone(list_iphones(run), name)
    if app is None or not app.is_dir():
        raise UsageError(f"ios needs the benchmark app: build it with Xcode and give --runner PATH.app (given: {app})")
    run(["xcrun", "devicectl", "device", "install", "app", "--device", phone.identifier, str(app)])
    results = []
    for label, path in zip(unique_labels([p.stem for p in paths]), paths, strict=True):
        with tempfile.TemporaryDirectory() as work:
            run(["xcrun", "coremlcompiler", "compile", str(path), work])
            compiled = Path(work) / f"{path.stem}.mlmodelc"
            run(copy_command(phone, compiled))
        results.append(parse_ios(run(launch_command(phone, compiled.name, options)), label, path, phone))
    return ProbeRun(results=tuple(results), ratios=())


def copy_command(phone: IPhone, compiled: Path) -> list[str]:
    """Copy a compiled model into the app's own documents."""
    return [
        "xcrun", "devicectl", "device", "copy", "to", "--device", phone.identifier, "--domain-type", "appDataContainer",
        "--domain-identifier", BUNDLE_ID, "--source", str(compiled), "--destination", f"Documents/{compiled.name}",
    ]  # fmt: skip


def launch_command(phone: IPhone, model: str, options: ProbeOptions) -> list[str]:
    """Launch the app with its output on this console until it exits; words after its identifier are the app's.

    `script` gives devicectl a terminal: without one it keeps the app's stdout to itself.
    """
    return [
        "script", "-q", "-t", "0", "/dev/null",
        "xcrun", "devicectl", "device", "process", "launch", "--console", "--terminate-existing",
        "--device", phone.identifier, BUNDLE_ID, "--model_path", model, "--json",
        "--warmup", str(options.warmup), "--num_executions", str(options.samples),
    ]  # fmt: skip


def list_iphones(run: Run) -> list[IPhone]:
    """Every iPhone and iPad that Xcode knows."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "devices.json"
        run(["xcrun", "devicectl", "list", "devices", "--json-output", str(out)])
        if not out.is_file():
            raise DeviceError("devicectl wrote no list of devices; it needs Xcode 15 or newer")
        return parse_devices(out.read_text())


def parse_devices(text: str) -> list[IPhone]:
    """iPhones and iPads from devicectl's JSON; it lists watches and headsets too. DeviceError for another form."""
    try:
        rows = json.loads(text)["result"]["devices"]
        return [_iphone(row) for row in rows if row["hardwareProperties"].get("platform", "iOS") == "iOS"]
    except (ValueError, KeyError, TypeError) as error:
        raise DeviceError(
            f"devicectl's list of devices has an unknown form ({error!r}); which Xcode is this?"
        ) from None


def _iphone(row: dict[str, Any]) -> IPhone:
    own, hardware, link = row["deviceProperties"], row["hardwareProperties"], row["connectionProperties"]
    why = ""
    if link.get("pairingState") != "paired":
        why = "not paired: unlock it and tap Trust"
    elif own.get("developerModeStatus") == "disabled":
        why = "developer mode is off: Settings, Privacy & Security, Developer Mode"
    elif link.get("tunnelState") == "unavailable":  # "disconnected" is fine: devicectl connects when it is used
        why = "not reachable: connect the cable and unlock it"
    model = hardware.get("marketingName") or hardware.get("productType", "")
    identifier, udid = row["identifier"], hardware.get("udid", "")
    return IPhone(identifier, own.get("name", identifier), udid, model, own.get("osVersionNumber", ""), not why, why)


def choose_iphone(found: list[IPhone], name: str | None) -> IPhone:
    """The phone called `name` (or with that identifier or UDID), or the only ready one."""
    if name is not None:
        named = [each for each in found if name in (each.name, each.identifier, each.udid)]
        if not named:
            raise UsageError(f"no iPhone {name!r}; {suggest(name, [each.name for each in found])}")
        if not named[0].ready:
            raise DeviceError(f"{named[0].name} is {named[0].why_not}")
        return named[0]
    ready = [each for each in found if each.ready]
    if len(ready) > 1:
        raise UsageError(f"{len(ready)} iPhones: {', '.join(e.name for e in ready)}; choose with --device ios:NAME")
    if not ready:
        why = "; ".join(f"{each.name} is {each.why_not}" for each in found) or "connect one and tap Trust"
        raise DeviceError(f"no iPhone is ready: {why}")
    return ready[0]


def parse_ios(console: str, label: str, path: Path, phone: IPhone) -> Latency:
    """A result from the app's console output. DeviceError when it holds no figures."""
    device = Device(kind="apple", name=phone.model, os=f"iOS {phone.os}", arch="arm64", serial=phone.identifier,
                    runtime="Core ML")  # fmt: skip
    row = parse_report(console)["models"][0]
    return latency_of(
        path, label, device, row["samples_ms"], load_ms=row.get("load_ms"), first_ms=row.get("first_ms"),
        warmup_runs=row.get("warmup_runs", 0), notes=(NOT_TRIED,),
    )  # fmt: skip


def _xcrun(command: list[str]) -> str:
    """Run one of Xcode's tools; DeviceError with its last words when it fails."""
    if shutil.which("xcrun") is None:
        raise DeviceError("xcrun is missing: install Xcode, then xcode-select --install")
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-2:]
        raise DeviceError(
            f"`{' '.join(command[command.index('xcrun') :][:5])}` failed: {' | '.join(said) or done.returncode}"
        )
    return done.stdout

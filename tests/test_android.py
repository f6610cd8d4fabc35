"""The Android probe through the real adb program, against a loopback phone; and every way a phone can fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_adbd import FakePhone, Faults, kill_runner, wait_for
from phone_models import Tiny, tiny

from edge_ibtm import runner
from edge_ibtm.errors import DeviceError, UsageError
from edge_ibtm.probe import ProbeOptions, android, host
from edge_ibtm.probe.adb import Adb, ConnectionLost, choose_device, list_devices
from edge_ibtm.probe.android import AndroidOptions, probe_android
from edge_ibtm.probe.phone import read_condition, read_phone

ADB = shutil.which("adb")
pytestmark = [
    pytest.mark.skipif(ADB is None, reason="adb is not installed: apt install adb"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
]
QUICK = ProbeOptions(samples=8, warmup=1, warmup_seconds=0.2)


@pytest.fixture(scope="module", autouse=True)
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An adb server of its own, so that the tests touch no phone of the developer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    changed = {"ANDROID_ADB_SERVER_PORT": str(port), "HOME": str(tmp_path_factory.mktemp("home"))}
    cache = {"EDGE_IBTM_CACHE": str(runner.cache_folder())}
    before = {name: os.environ.get(name) for name in changed | cache}
    os.environ.update(changed | cache)
    yield
    subprocess.run([ADB, "kill-server"], capture_output=True)
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def files() -> Tiny:
    return tiny()


@pytest.fixture(scope="module")
def bundle() -> runner.Bundle:
    return runner.build("host")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results that are kept for later go here; the runner was built before."""
    monkeypatch.setenv("EDGE_IBTM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def connect(phone: FakePhone) -> FakePhone:
    subprocess.run([ADB, "connect", phone.serial], capture_output=True, timeout=30)
    return phone


@pytest.fixture
def phone(tmp_path: Path) -> Iterator[FakePhone]:
    made = connect(FakePhone(tmp_path / "phone", abi="x86_64,x86"))
    yield made
    subprocess.run([ADB, "disconnect", made.serial], capture_output=True, timeout=30)
    made.close()


@pytest.fixture
def reference(files: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own outputs, computed without a child process each time."""

    def run_files(paths: list[Path], inputs: object, trace: bool = False) -> list[host.Execution]:
        given = [[files.example]] * len(paths) if inputs is None else [list(one) for one in inputs]
        return [host.Execution(one, [files.model(*one).detach()], ()) for one in given]

    monkeypatch.setattr(android, "run_files", run_files)


def options(phone: FakePhone, bundle: runner.Bundle, **changes: object) -> AndroidOptions:
    base = AndroidOptions(
        serial=phone.serial, runner=bundle.folder, threads=1, loop=QUICK, reconnect_seconds=8, gate_seconds=0.2
    )
    return replace(base, **changes)


def test_the_whole_probe(phone: FakePhone, bundle: runner.Bundle, files: Tiny, cache: Path) -> None:
    loop = replace(QUICK, profile=True)
    run = probe_android(
        [files.pte, files.portable], [[files.example]] * 2, options(phone, bundle, loop=loop, cores="big"),
        expected=[[files.expected]] * 2,
    )  # fmt: skip
    fast, slow = run.results
    assert fast.device.kind == "android" and fast.device.name == "Acme Loopback One"
    assert fast.device.os == "Android 14" and fast.device.serial == phone.serial and not fast.emulated
    assert len(fast.samples_ms) == 8 and fast.threads == 1 and fast.load_ms > 0 and fast.first_ms > 0
    assert fast.placement == "big" and fast.device.facts["cpus"] == "1"
    assert fast.device.facts["battery_percent_before"] == "80"
    assert fast.device.thermal_c_before == {"skin-therm": 31.0}
    assert fast.parity.ok and slow.parity.ok and any("against eager" in note for note in fast.notes)
    assert fast.profile.outside_ms == 0 and slow.profile.outside_ms > 0
    assert run.ratios[0].value > 1 and run.ratios[0].rounds == 8
    assert phone.left_behind() == [] and not list(cache.rglob("*.json"))
    assert not list(phone.root.rglob("pwned*")), "a model's name reached the phone's shell"
    assert not any("slow" in path for path in phone.pushed)


@pytest.mark.usefixtures("reference", "cache")
class TestFaults:
    def test_keep_sends_nothing_twice(self, phone: FakePhone, bundle: runner.Bundle, files: Tiny) -> None:
        probe_android([files.pte], None, options(phone, bundle, keep=True))
        first = [path for path in phone.pushed if "run-" not in path]
        assert len(first) == len(bundle.files) + 2
        phone.pushed.clear()
        probe_android([files.pte], None, options(phone, bundle))
        assert [path for path in phone.pushed if "run-" not in path] == []
        assert phone.left_behind() == []

    def test_a_file_that_changed_on_the_phone_is_sent_again(
        self, phone: FakePhone, bundle: runner.Bundle, files: Tiny
    ) -> None:
        probe_android([files.pte], None, options(phone, bundle, keep=True))
        (model,) = (phone.root / "data/local/tmp/edge-ibtm").glob("*.pte")
        model.write_bytes(bytes(model.stat().st_size))
        phone.pushed.clear()
        run = probe_android([files.pte], None, options(phone, bundle))
        assert [Path(path).suffixes for path in phone.pushed if "run-" not in path] == [[".pte", ".part"]]
        assert run.results[0].parity.ok and phone.left_behind() == []

    def test_cable_pulled_while_files_are_sent(self, phone: FakePhone, bundle: runner.Bundle, files: Tiny) -> None:
        phone.faults.cut_after_files, phone.faults.away_seconds = 3, 1.0
        run = probe_android([files.pte], None, options(phone, bundle))
        assert run.results[0].parity.ok and phone.left_behind() == []

    def test_cable_pulled_while_it_runs(self, phone: FakePhone, bundle: runner.Bundle, files: Tiny) -> None:
        cut: list[str] = []

        def pull_once(script: str) -> None:
            if "kill -0" in script and not cut:
                cut.append(script)
                phone.cut(1.0)

        phone.faults.on_shell = pull_once
        run = probe_android([files.pte], None, options(phone, bundle))
        assert cut and len(run.results[0].samples_ms) == 8 and phone.left_behind() == []

    def test_a_phone_that_stays_away_keeps_its_rounds(
        self, phone: FakePhone, bundle: runner.Bundle, files: Tiny, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def pull(script: str) -> None:
            if "kill -0" in script:
                progress = phone.root / "data/local/tmp/edge-ibtm"
                wait_for(lambda: any(p.stat().st_size for p in progress.rglob("progress.txt")))
                phone.cut(30)

        phone.faults.on_shell = pull
        slow = replace(QUICK, samples=4000)
        with pytest.raises(ConnectionLost, match="did not come back within 1 s.*run the same command again"):
            probe_android([files.portable], None, options(phone, bundle, loop=slow, reconnect_seconds=1))
        phone.faults.on_shell, phone.faults.refuse = None, False
        subprocess.run([ADB, "disconnect", phone.serial], capture_output=True, timeout=30)
        connect(phone)
        run = probe_android([files.portable], None, options(phone, bundle, loop=replace(slow, samples=300)))
        assert "going on after" in capsys.readouterr().err
        assert len(run.results[0].samples_ms) >= 300 and phone.left_behind() == []

    def test_runner_killed_once_is_started_again(
        self, phone: FakePhone, bundle: runner.Bundle, files: Tiny, capsys: pytest.CaptureFixture[str]
    ) -> None:
        killed = kill_runner(phone, times=1)
        run = probe_android([files.portable], None, options(phone, bundle, loop=replace(QUICK, samples=1500)))
        assert killed and len(run.results[0].samples_ms) == 1500
        assert "was killed on the phone after" in capsys.readouterr().err
        assert phone.left_behind() == []

    def test_runner_killed_again_and_again(
        self, phone: FakePhone, bundle: runner.Bundle, files: Tiny, cache: Path
    ) -> None:
        kill_runner(phone, times=99)
        with pytest.raises(DeviceError, match="killed on the phone by signal 9, 2 times.*rounds are kept in") as caught:
            probe_android([files.portable], None, options(phone, bundle, loop=replace(QUICK, samples=9000)))
        (kept,) = (cache / "probes").glob("*.json")
        assert str(kept) in str(caught.value) and len(json.loads(kept.read_text())) > 0
        assert phone.left_behind() == []

    def test_interrupted_by_hand(self, phone: FakePhone, bundle: runner.Bundle, files: Tiny) -> None:
        runners: list[int] = []

        def interrupt(script: str) -> None:
            if "kill -0" in script:
                phone.faults.on_shell = None
                (pid,) = (phone.root / "data/local/tmp/edge-ibtm").glob("run-*/pid")
                runners.append(int(pid.read_text()))
                os.kill(os.getpid(), signal.SIGINT)

        phone.faults.on_shell = interrupt
        with pytest.raises(KeyboardInterrupt):
            probe_android([files.portable], None, options(phone, bundle, loop=replace(QUICK, samples=100000)))
        assert phone.left_behind() == []
        wait_for(lambda: not Path(f"/proc/{runners[0]}").exists(), 5)

    def test_full_phone_by_its_own_account(self, phone: FakePhone, bundle: runner.Bundle, files: Tiny) -> None:
        (phone.root / "df").write_text("/dev/block/dm-5 1000 990 10 99% /data\n")
        with pytest.raises(DeviceError, match=r"0 MB free, \d+ MB are needed"):
            probe_android([files.pte], None, options(phone, bundle))
        assert phone.left_behind() == []

    def test_disk_fills_while_files_are_sent(self, phone: FakePhone, bundle: runner.Bundle, files: Tiny) -> None:
        phone.faults.full = True
        with pytest.raises(DeviceError, match="No space left.*free some storage"):
            probe_android([files.pte], None, options(phone, bundle))
        assert phone.left_behind() == []

    def test_wrong_abi(self, tmp_path: Path, bundle: runner.Bundle, files: Tiny) -> None:
        for abi, given, says in (
            ("armeabi-v7a", None, "ABI armeabi-v7a; the runner needs arm64-v8a"),
            ("arm64-v8a,armeabi-v7a", bundle.folder, "is for x86_64"),
        ):
            phone = connect(FakePhone(tmp_path / abi, abi=abi))
            with pytest.raises(DeviceError, match=says):
                probe_android([files.pte], None, options(phone, bundle, runner=given))
            phone.close()

    def test_runner_refuses(self, phone: FakePhone, bundle: runner.Bundle, files: Tiny) -> None:
        with pytest.raises(DeviceError, match="exit code 3.*VulkanBackend is not registered"):
            probe_android([files.vulkan], None, options(phone, bundle))
        with pytest.raises(DeviceError, match="exit code 4.*holds 3072 bytes, the program takes .1,3,32,32."):
            probe_android([files.pte], [[torch.zeros(1, 3, 16, 16)]], options(phone, bundle))
        assert phone.left_behind() == []

    def test_a_users_own_executor_runner(
        self, phone: FakePhone, bundle: runner.Bundle, files: Tiny, tmp_path: Path
    ) -> None:
        program = tmp_path / "executor_runner"
        program.write_text(
            '#!/bin/sh\nn=0; [ -f "$2" ] || exit 1\n'
            'while [ $n -lt "$4" ]; do n=$((n+1)); echo "I 00:00 executor_runner: Iteration $n of $4: $n.5 ms"; done\n'
        )
        run = probe_android(
            [files.vulkan], None, options(phone, bundle, runner=program, loop=replace(QUICK, samples=6))
        )
        (result,) = run.results
        assert result.samples_ms == (2.5, 3.5, 4.5, 5.5, 6.5, 7.5), "one warm-up run was dropped"
        assert result.source == "executor_runner" and result.parity is None and "not verified" in result.notes[0]
        with pytest.raises(UsageError, match="--cores and --profile"):
            probe_android([files.pte], None, options(phone, bundle, runner=program, cores="big"))
        phone.battery(temperature=51)
        with pytest.raises(DeviceError, match="51.0 Celsius.*limit is 45.0"):
            probe_android([files.pte], None, options(phone, bundle, runner=program))
        phone.battery(temperature=30)
        program.write_text("#!/bin/sh\necho no backend >&2; exit 9\n")
        with pytest.raises(DeviceError, match="executor_runner ended with exit code 9 on the phone: no backend"):
            probe_android([files.pte], None, options(phone, bundle, runner=program))
        assert phone.left_behind() == []

    def test_wrong_outputs_are_seen(
        self, phone: FakePhone, bundle: runner.Bundle, files: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong = host.Execution([files.example], [files.expected + 0.1], ())
        monkeypatch.setattr(android, "run_files", lambda *_, **__: [wrong])
        parity = probe_android([files.pte], None, options(phone, bundle)).results[0].parity
        assert not parity.ok and parity.max_abs == pytest.approx(0.1, rel=1e-3)

    def test_too_warm(self, phone: FakePhone, bundle: runner.Bundle, files: Tiny) -> None:
        phone.battery(temperature=51)
        with pytest.raises(DeviceError, match="51.0 Celsius.*limit is 45.0"):
            probe_android([files.pte], None, options(phone, bundle))
        assert phone.left_behind() == []


def test_no_phone_and_two_phones(tmp_path: Path, phone: FakePhone) -> None:
    subprocess.run([ADB, "disconnect"], capture_output=True)
    connect(phone)
    assert choose_device(None).serial == phone.serial
    second = connect(FakePhone(tmp_path / "second"))
    with pytest.raises(UsageError, match=rf"2 phones: .*{second.serial} \(device\).*--device android:SERIAL"):
        choose_device(None)
    assert choose_device(second.serial).serial == second.serial
    with pytest.raises(DeviceError, match=r"no phone 'R58M1'; adb sees: .*check the cable"):
        choose_device("R58M1")
    second.close()
    subprocess.run([ADB, "disconnect"], capture_output=True)
    with pytest.raises(DeviceError, match="no phone: connect one, switch on USB debugging"):
        choose_device(None)


@pytest.mark.parametrize(
    ("faults", "state", "says"),
    [
        (Faults(unauthorized=True), "unauthorized", "is unauthorized: unlock it and allow USB debugging"),
        (Faults(silent=True), "offline", "is offline: unplug it"),
    ],
)
def test_unauthorized_and_offline(tmp_path: Path, faults: Faults, state: str, says: str) -> None:
    phone = FakePhone(tmp_path / "phone", faults=faults)
    threading.Thread(target=connect, args=(phone,), daemon=True).start()
    wait_for(lambda: list_devices(ADB).get(phone.serial) == state, 20)
    with pytest.raises(DeviceError, match=says):
        choose_device(phone.serial)
    subprocess.run([ADB, "disconnect", phone.serial], capture_output=True)
    phone.close()


def test_adb_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("ADB", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "adbutils", None)
    with pytest.raises(DeviceError, match="adb is missing: apt install adb"):
        choose_device(None)


@pytest.mark.parametrize("shell_v2", [True, False])
def test_shell_keeps_words_and_exit_codes(tmp_path: Path, shell_v2: bool) -> None:
    phone = connect(FakePhone(tmp_path / "p", shell_v2=shell_v2))
    adb = Adb(phone.serial, ADB, attempts=1)
    assert adb.shell("printf '%s|' 'a b' '$HOME;' \"it's\"") == "a b|$HOME;|it's|"
    assert adb.status("exit 7")[0] == 7
    with pytest.raises(DeviceError, match="answered 3 to `exit 3`"):
        adb.shell("exit 3")
    source = tmp_path / "a file; rm -rf x"
    source.write_bytes(os.urandom(700_000))
    adb.push(source, "/data/local/tmp/it's $HOME")
    adb.pull("/data/local/tmp/it's $HOME", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    with pytest.raises(DeviceError) as refused:
        adb.push(tmp_path / "closed", "/data/local/tmp/none")
    assert not isinstance(refused.value, ConnectionLost), "the file is not there; its name is no word of adb's"
    phone.close()


def test_facts_and_condition(phone: FakePhone) -> None:
    adb = choose_device(phone.serial)
    facts = read_phone(adb)
    assert facts.abis == ("x86_64", "x86") and facts.max_khz == {0: 1800000, 1: 2800000} and facts.sdk == "34"
    phone.thermal_status(3)
    now = read_condition(adb)
    assert (now.battery, now.plugged, now.temperature, now.status) == (80, True, 31.0, 3)

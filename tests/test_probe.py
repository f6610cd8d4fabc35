"""Host and torch probes: the schema, the statistics, and every way a program can be bad."""

from __future__ import annotations

import json
import math
import os
import random
import statistics as reference
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phone_models import Tiny, tiny
from pydantic import ValidationError

from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.probe import Device, Emulated, Latency, ProbeOptions, facts, host, probe, probe_many, read_results
from edge_ibtm.probe.host import run_files
from edge_ibtm.probe.loop import sample_rounds, warm_up
from edge_ibtm.probe.schema import json_schema
from edge_ibtm.probe.statistics import median_interval, paired_ratio_interval, settled

QUICK = ProbeOptions(samples=12, warmup=2, warmup_seconds=0.5)


@pytest.fixture(scope="module")
def files() -> Tiny:
    return tiny()


def test_a_file_is_measured_whole(files: Tiny) -> None:
    found = probe(files.pte, files.example, threads=1, options=QUICK)
    assert isinstance(found, Latency)
    assert found.min_ms <= found.p50_ms <= found.p90_ms <= found.p99_ms
    assert found.p50_ms == pytest.approx(reference.median(found.samples_ms))
    assert len(found.samples_ms) == 12 and found.warmup_runs >= 2 and found.threads == 1
    low, high = found.median_interval_ms
    assert low <= found.p50_ms <= high and found.confidence == 0.95
    assert found.load_ms > found.init_ms > 0 and found.first_ms > 0 and found.peak_rss_mb > 50
    assert found.device.kind == "host" and not found.emulated and "executorch 1." in found.device.runtime
    assert found.bytes == files.pte.stat().st_size and len(found.sha256) == 64


def test_several_files_interleave_and_compare(files: Tiny) -> None:
    run = probe_many([files.pte, files.portable, files.pte], files.example, threads=1, options=QUICK)
    assert [r.model for r in run.results] == ["tiny", "slow one; touch pwned", "tiny#2"]
    slow, again = run.ratios
    assert slow.baseline == "tiny" and slow.rounds == 12
    assert slow.low <= slow.value <= slow.high
    assert slow.value == pytest.approx(run.results[1].p50_ms / run.results[0].p50_ms)
    assert slow.low > 1.5, "a program without a delegate is many times slower"
    assert again.model == "tiny#2"


def test_outputs_are_the_models(files: Tiny) -> None:
    (done,) = run_files([files.pte], [[files.example]])
    torch.testing.assert_close(done.outputs[0], files.expected, atol=1e-5, rtol=1e-5)
    noise = run_files([files.pte])[0]
    assert noise.inputs[0].shape == files.example.shape
    torch.testing.assert_close(noise.outputs[0], files.model(noise.inputs[0]).detach(), atol=1e-5, rtol=1e-5)


def test_profile_names_operators(files: Tiny) -> None:
    options = ProbeOptions(samples=5, warmup=1, warmup_seconds=0.2, profile=True)
    run = probe_many([files.pte, files.portable], files.example, threads=1, options=options)
    delegated, portable = (r.profile for r in run.results)
    assert any("Convolution" in o.name and o.calls == 2 for o in delegated.operators)
    assert delegated.outside_ms == 0
    assert portable.operators[0].name == "convolution.out" and portable.operators[0].backend == "portable"
    assert portable.outside_ms == pytest.approx(portable.total_ms)
    assert math.fsum(o.share for o in portable.operators) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("truncated", UsageError, "cut short: 2000 of"),
        ("foreign", UsageError, "not an ExecuTorch program"),
        ("vulkan", EdgeIBTMError, "VulkanBackend is not registered"),
    ],
)
def test_bad_files_are_named(files: Tiny, name: str, error: type[Exception], says: str) -> None:
    path = getattr(files, name)
    with pytest.raises(error, match=says) as caught:
        probe(path, files.example, options=QUICK)
    assert str(path) in str(caught.value)


def test_missing_and_empty_files(files: Tiny, tmp_path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        probe(tmp_path / "none.pte", files.example)
    (tmp_path / "empty.pte").write_bytes(b"")
    with pytest.raises(UsageError, match="0 bytes"):
        probe(tmp_path / "empty.pte", files.example)


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (torch.zeros(1, 3, 16, 16), r"\[1, 3, 16, 16\].*1, 3, 32, 32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "expected Float"),
        ((torch.zeros(1), torch.zeros(1)), "takes 1 inputs, 2 given"),
    ],
)
def test_inputs_that_do_not_fit(files: Tiny, example: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        probe(files.pte, example, options=QUICK)


def test_damage_inside_a_file_never_takes_this_process_down(files: Tiny, tmp_path) -> None:
    data = bytearray(files.pte.read_bytes())
    rng = random.Random(3)
    for position in rng.sample(range(64, len(data)), 400):
        data[position] ^= 0xFF
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes(data)
    with pytest.raises(EdgeIBTMError, match="damaged"):
        probe(damaged, files.example, options=QUICK)


def test_a_native_abort_becomes_a_message(files: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    script = tmp_path / "aborts"
    script.write_text(f"#!{sys.executable}\nimport os, sys\nprint('XNN died', file=sys.stderr, flush=True)\nos.abort()\n")
    os.chmod(script, 0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(EdgeIBTMError, match="SIGABRT on tiny.pte: XNN died"):
        probe(files.pte, files.example)


def test_bad_requests() -> None:
    with pytest.raises(UsageError, match="unknown device 'hots'.*'host'"):
        probe("x.pte", torch.zeros(1), device="hots")
    with pytest.raises(UsageError, match="samples = 0"):
        ProbeOptions(samples=0)
    with pytest.raises(UsageError, match="--device mac.*edge-ibtm verify"):
        probe("merged.coreml.fp16.mlpackage", None)
    with pytest.raises(UsageError, match="nothing to probe"):
        probe_many([], torch.zeros(1))
    with pytest.raises(UsageError, match="no such file: /no/p.pte"):
        probe_many("/no/p.pte", torch.zeros(1))
    with pytest.raises(UsageError, match="threads = 0"):
        probe(torch.nn.Identity(), torch.zeros(1), threads=0)


def test_models_in_torch() -> None:
    small, large = torch.nn.Linear(8, 8), torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(12)])
    before = torch.get_num_threads()
    run = probe_many([small, small], torch.zeros(4, 8), threads=1, device="torch", options=QUICK)
    alone = probe_many(torch.nn.Sequential(small, small), torch.zeros(4, 8), threads=1, device="torch", options=QUICK)
    assert [r.model for r in alone.results] == ["Sequential-eager"]
    assert [r.model for r in run.results] == ["Linear-eager", "Linear-eager#2"]
    slow = probe(large, torch.zeros(256, 512), threads=1, options=QUICK)
    assert slow.p50_ms > run.results[0].p50_ms
    assert slow.device.runtime.startswith("torch 2.") and slow.load_ms is None
    assert torch.get_num_threads() == before


def test_every_model_gets_its_own_example() -> None:
    seen: list[tuple[int, ...]] = []

    class Sees(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape))
            return x

    probe_many([Sees(), Sees()], [torch.zeros(1, 2), torch.zeros(1, 3)], threads=1, options=QUICK)
    assert set(seen) == {(1, 2), (1, 3)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_said() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        probe(torch.nn.Identity(), torch.zeros(1), device="cuda")


def test_warm_up_goes_on_until_stable() -> None:
    import time

    delays = iter([0.02, 0.015, 0.01] + [0.002] * 200)
    runs, stable = warm_up(lambda: time.sleep(next(delays)), ProbeOptions(warmup=2, warmup_seconds=5))
    assert stable and runs >= 10


def test_rounds_rotate_their_order() -> None:
    order: list[str] = []
    sample_rounds([lambda: order.append("a"), lambda: order.append("b")], ProbeOptions(samples=4))
    assert "".join(order) == "abbaabba"


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_median_interval_holds_the_median(samples: list[float]) -> None:
    low, high, reached = median_interval(samples)
    assert low <= reference.median(samples) <= high
    assert (reached >= 0.95) == (len(samples) >= 6)


def test_median_interval_covers_as_often_as_it_says() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        low, high, _ = median_interval([rng.expovariate(1) for _ in range(15)])
        hits += low <= math.log(2) <= high
    assert 0.94 <= hits / 2000 <= 0.99


def test_paired_interval_ignores_what_slows_both() -> None:
    rng = random.Random(0)
    noise = [rng.uniform(1, 5) for _ in range(50)]
    low, high = paired_ratio_interval([0.5 * n for n in noise], noise)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)


def test_settled_needs_two_windows_that_agree() -> None:
    assert not settled([1.0] * 9)
    assert settled([1.0] * 10)
    assert not settled([2.0] * 5 + [1.0] * 5)


def test_emulated_results_have_no_latency() -> None:
    device = Device(kind="emulated", name="qemu-aarch64 -cpu cortex-a76")
    result = Emulated(model="m", device=device, instructions=5)
    assert result.emulated and not any(name.endswith("_ms") for name in Emulated.model_fields)
    with pytest.raises(ValidationError, match="p50_ms"):
        Emulated.model_validate({"model": "m", "device": device, "p50_ms": 3.0})


def test_results_survive_a_file(files: Tiny, tmp_path) -> None:
    run = probe_many([files.pte], files.example, threads=1, options=QUICK)
    (tmp_path / "run.json").write_text(run.model_dump_json())
    assert read_results(tmp_path / "run.json") == run
    (tmp_path / "log.txt").write_text("tiny on AMD\n" + run.results[0].model_dump_json() + "\n")
    assert read_results(tmp_path / "log.txt").results == run.results
    (tmp_path / "other.json").write_text('{"accuracy": 3}')
    with pytest.raises(UsageError, match="not a probe result"):
        read_results(tmp_path / "other.json")
    schema = json.dumps(json_schema())
    assert "median_interval_ms" in schema and "instructions" in schema


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 1\nflags\t: fma avx avx2\n\nmodel name\t: no\n",
         "AMD EPYC (family 25 model 1, avx2)"),
        ("cpu family : 6\nmodel : 85\nmodel name : Xeon\nflags : avx2 avx512f avx\n", "Xeon (family 6 model 85, avx512f)"),
        ("cpu family : 6\nmodel : 7\nmodel name : X\nflags : avx avx512f avx512_vnni\n", "X (family 6 model 7, avx512f, vnni)"),
        ("processor : 0\nHardware : Qualcomm SM8550\n", "Qualcomm SM8550"),
    ],
)  # fmt: skip
def test_the_generation_of_a_cpu_is_told(text, name, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(facts, "_CPUINFO", tmp_path / "cpuinfo")
    assert facts.cpu_model() == name


def test_other_processes_are_told_where_they_took_a_tenth_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "usable_cores", lambda: 2)
    start = {"cpu": (100.0, 50.0, 7.0)}
    assert host.busy_note(start, {"cpu": (110.0, 70.0, 26.0)}) == ()  # 20 s of CPU, 19 of them its own
    (note,) = host.busy_note(start, {"cpu": (110.0, 70.0, 17.0)})
    assert note.startswith("other processes kept 1.0 of 2 cores busy")
    assert host.busy_note({"cpu": None}, {"cpu": None}) == ()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_cpu_seconds_of_the_machine_hold_those_of_this_process() -> None:
    before = facts.cpu_seconds()
    sum(i * i for i in range(3_000_000))
    after = facts.cpu_seconds()
    assert before and after
    clock, machine, own = (b - a for a, b in zip(before, after))
    assert own > 0.05 and machine > own - 0.05 and clock > own - 0.05

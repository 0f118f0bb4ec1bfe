"""Telemetry: bytes against hand counts, energy against known waveforms, metrics that are whole lines or nothing."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mango.errors import ConfigError
from mango.telemetry import MemoryLedger, PowerSampler, RunLog
from mango.telemetry import power as power_module

ROOT = Path(__file__).resolve().parents[1]


# memory


def test_parameters_gradients_and_buffers_are_counted_once_each() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 10, bias=False))
    model[2].weight = nn.Parameter(model[0].weight.detach().T)  # a view of another parameter's storage
    ledger = MemoryLedger(model)
    assert ledger.parameters() == 4 * (200 + 20 + 4 * 20) + 8
    assert ledger.gradients() == 0
    model(torch.randn(4, 10)).sum().backward()
    assert ledger.gradients() == 4 * (200 + 20 + 40 + 200)


def test_saved_activations_of_a_linear_stack_are_its_inputs() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    ledger = MemoryLedger(model)
    with ledger.activations():
        out = model(torch.randn(5, 16))
    assert ledger.saved_activations == 4 * (5 * 16 + 5 * 32)
    out.sum().backward()
    assert ledger._bytes == 0, "the backward pass frees everything"


def test_a_tensor_saved_twice_counts_once_and_relu_shares_its_output() -> None:
    model = nn.Linear(8, 8, bias=False)
    ledger = MemoryLedger(model)
    x = torch.randn(3, 8, requires_grad=True)
    with ledger.activations():
        (x * x + model(x).relu()).sum().backward()
    assert ledger.saved_activations == 4 * (3 * 8 + 3 * 8)  # x, and relu's output


def test_the_peak_is_of_what_is_alive_at_one_time() -> None:
    model = nn.Linear(64, 64, bias=False)
    ledger = MemoryLedger(model)
    with ledger.activations():
        for _ in range(3):
            model(torch.randn(10, 64)).sum().backward()
    assert ledger.saved_activations == 4 * 10 * 64


def test_checkpointed_blocks_keep_their_input_until_they_are_computed_again() -> None:
    block = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))
    plain, thrifty = MemoryLedger(block), MemoryLedger(block)
    x = torch.randn(6, 32, requires_grad=True)
    with plain.activations():
        block(x)
    with thrifty.activations():
        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    assert plain.saved_activations == 4 * (6 * 32 + 6 * 128)
    assert thrifty.saved_activations < plain.saved_activations


# metrics


def test_lines_are_whole_or_absent_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = """
        import resource, signal, sys
        from pathlib import Path
        from mango.telemetry.runlog import RunLog
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # stands in for a disk with 100 bytes left
        log = RunLog(Path(sys.argv[1]))
        log.write({"step": 1, "pad": "x" * 40})
        try:
            log.write({"step": 2, "pad": "x" * 60})
        except OSError as error:
            assert error.filename == sys.argv[1], error
            sys.exit(3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert done.returncode == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path) as log:
        log.write({"step": 1})
        kept = list(log.lines)
        log.write({"step": 2})
    with RunLog(path, kept) as log:
        log.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_number_that_json_does_not_know_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="JSON"):
        log.write({"loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


# energy


def stand_in(tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ``nvidia-smi`` on PATH that prints what ``body`` does."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_constant_power_gives_its_exact_integral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "echo 100.0; echo 50.0", monkeypatch)
    with PowerSampler(interval=0.02, source="nvidia-smi") as sampler:
        time.sleep(0.3)
    first, last = sampler.first, sampler.last
    assert sampler.source == "nvidia-smi"
    assert sampler.joules == pytest.approx(150.0 * (last - first), rel=1e-9)
    assert sampler.joules > 150.0 * 0.25
    assert sampler.missed == 0
    assert "mango-power" not in [thread.name for thread in threading.enumerate()]


def test_a_ramp_is_integrated_by_trapezoids(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ramp:
        mean = False

        def watts(self) -> float:
            return 10.0 * clock()

        def close(self) -> None:
            pass

    times = iter([0.0, 0.0, 1.0, 1.0, 3.0, 3.0, 3.5, 3.5])
    now = 0.0

    def clock() -> float:
        nonlocal now
        now = next(times)
        return now

    sampler = PowerSampler()
    sampler._reader = Ramp()
    monkeypatch.setattr(power_module.time, "monotonic", clock)
    for _ in range(4):
        sampler._sample()
    assert sampler.joules == pytest.approx(10.0 * 3.5**2 / 2)


def test_bad_samples_are_counted_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    answers = 'case $((n%4)) in 1) echo "[N/A]";; 2) exit 1;; 3) echo garbage;; *) echo 80;; esac'
    body = f"n=$(cat {count} 2>/dev/null || echo 0); echo $((n+1)) > {count}; {answers}"
    stand_in(tmp_path, body, monkeypatch)
    with PowerSampler(interval=0.01, source="nvidia-smi") as sampler:
        while sampler.samples < 3:
            time.sleep(0.01)
    assert sampler.missed >= 3
    assert sampler.joules == pytest.approx(80.0 * (sampler.last - sampler.first), rel=1e-9)


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, f"sleep 60 & echo $! >> {tmp_path}/children; wait", monkeypatch)
    monkeypatch.setattr(power_module, "TIMEOUT", 0.2)
    begin = time.monotonic()
    with PowerSampler(interval=0.01, source="nvidia-smi") as sampler:
        pass
    assert time.monotonic() - begin < 20
    assert sampler.joules is None
    assert "0 good samples" in str(sampler.reason)
    for child in (tmp_path / "children").read_text().split():
        status = Path(f"/proc/{child}/status")
        assert not status.exists() or "Z (zombie)" in status.read_text()


def test_counters_of_energy_are_differenced_and_wrap_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0, which would be counted twice
    package.mkdir()
    (package / "max_energy_range_uj").write_text("1000000\n")
    (package / "energy_uj").write_text("900000\n")
    monkeypatch.setattr(power_module, "RAPL", tmp_path)
    with PowerSampler(interval=30.0, source="rapl") as sampler:
        (package / "energy_uj").write_text("400000\n")
        time.sleep(0.05)
    assert sampler.joules == pytest.approx(0.5, rel=0.02)


def test_no_source_gives_null_with_the_reasons_and_never_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power_module, "RAPL", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with PowerSampler(source="rapl") as sampler:
        pass
    assert (sampler.joules, sampler.source) == (None, None)
    assert "has no counters" in str(sampler.reason)
    with PowerSampler(source="nvidia-smi") as sampler:
        pass
    assert "no such program" in str(sampler.reason)


@pytest.mark.parametrize(("options", "words"), [({"source": "tdp"}, "one of auto, nvml"), ({"interval": 0.0}, "seconds, above 0")])
def test_bad_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PowerSampler(**options)  # type: ignore[arg-type]

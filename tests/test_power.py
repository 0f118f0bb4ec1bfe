"""Power and energy: known waveforms, faults that are counted and survived, no thread or process left behind."""

from __future__ import annotations

import math
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from mango.errors import ConfigError
from mango.telemetry import PowerSampler
from mango.telemetry import power as power_module
from mango.telemetry import sources as sources_module


def stand_in(tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ``nvidia-smi`` on PATH that prints what ``body`` does."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_constant_power_gives_its_exact_integral_for_each_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "echo 100.0; echo 50.0", monkeypatch)
    with PowerSampler(interval=0.02, source="nvidia-smi") as sampler:
        time.sleep(0.3)
    seconds = sampler.last - sampler.first
    assert sampler.source == "nvidia-smi"
    assert sampler.joules == pytest.approx(150.0 * seconds, rel=1e-9)
    assert sampler.joules > 150.0 * 0.25
    assert sampler.devices == pytest.approx((100.0 * seconds, 50.0 * seconds), rel=1e-9)
    assert sampler.watts == pytest.approx(150.0)
    assert (sampler.missed, sampler.malformed) == (0, 0)
    assert "mango-power" not in [thread.name for thread in threading.enumerate()]


class Wave(NamedTuple):
    """A power that is known at every time t, in seconds since the start."""

    shell: str  # watts from milliseconds, in the shell's integers
    watts: Callable[[float], float]
    joules: Callable[[float], float]  # the integral from 0
    variation: Callable[[float, float], float]  # sum of all rises and falls between two times, watts


WAVES = {
    "constant": Wave("80", lambda t: 80.0, lambda t: 80.0 * t, lambda a, b: 0.0),
    "ramp": Wave("50 + ms / 10", lambda t: 50.0 + 100.0 * t, lambda t: 50.0 * t + 50.0 * t**2, lambda a, b: 100.0 * (b - a)),
    "square": Wave(
        "100 + 100 * (ms / 500 % 2)",
        lambda t: 100.0 + 100.0 * (t // 0.5 % 2),
        lambda t: 100.0 * t + 100.0 * (t // 1.0 * 0.5 + max(0.0, t % 1.0 - 0.5)),
        lambda a, b: 100.0 * (b // 0.5 - a // 0.5),
    ),
}


@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("trouble", ["none", "faults"])
def test_a_program_that_prints_a_waveform_is_integrated_within_what_its_gaps_hide(
    wave: str, trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waveform is a function of the machine's clock. A busy machine stretches the gaps between samples, and with them the bound.

    In a gap of h seconds trapezoids err by h / 2 times the variation inside; as much again comes from when in its run the program reads.
    """
    known = WAVES[wave]
    count = tmp_path / "count"
    # every tenth answer: garbage, [N/A], exit 1, and a late one
    faults = "case $((n % 40)) in 7) echo garbage; exit;; 17) echo '[N/A]'; exit;; 27) exit 1;; 37) sleep 0.1;; esac"
    trouble_body = f"n=$(cat {count} 2>/dev/null || echo 0); echo $((n + 1)) > {count}; {faults}" if trouble == "faults" else ""
    start = time.clock_gettime_ns(time.CLOCK_REALTIME)
    offset = start / 1e9 - time.monotonic()
    body = f"{trouble_body}\nms=$((($(date +%s%N) - {start}) / 1000000))\necho $(({known.shell}))"
    stand_in(tmp_path, body, monkeypatch)
    with PowerSampler(interval=0.01, source="nvidia-smi") as sampler:
        while sampler.samples < 40:
            time.sleep(0.01)
    first, last = (moment + offset - start / 1e9 for moment in (sampler.first, sampler.last))
    hidden = sampler.gap * known.variation(first - sampler.gap, last + sampler.gap)
    assert sampler.joules == pytest.approx(known.joules(last) - known.joules(first), rel=1e-6, abs=hidden)  # clocks in float64: 2e-7 s
    if trouble == "faults":
        assert sampler.missed >= 1
        assert sampler.malformed >= 2


class Scripted:
    """A source whose values are a function of a clock that the test moves."""

    def __init__(self, values: Callable[[float], list[float]], counts: bool = False) -> None:
        self.counts, self.values, self.now = counts, values, 0.0

    def read(self) -> list[float]:
        return self.values(self.now)

    def close(self) -> None:
        pass


def scripted(source: Scripted, monkeypatch: pytest.MonkeyPatch, times: Sequence[float], **options: float) -> PowerSampler:
    """A sampler that has taken one sample at each time."""
    sampler = PowerSampler(**options)  # type: ignore[arg-type]
    sampler._reader = source
    monkeypatch.setattr(power_module.time, "monotonic", lambda: source.now)
    for source.now in times:
        sampler.sample()
    return sampler


@pytest.mark.parametrize("wave", WAVES)
def test_energy_of_known_waveforms_is_within_two_percent_with_gaps_and_faults(wave: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten samples a second for a minute, in drifting phase with the wave: a tenth fails, a tenth is no number, some are late."""
    known, calls = WAVES[wave], 0

    def read(now: float) -> list[float]:
        nonlocal calls
        calls += 1
        if calls % 10 == 3:
            raise OSError("no answer")
        return [math.nan if calls % 10 == 8 else known.watts(now)]

    times = [0.101 * n + (0.5 if n % 50 == 0 else 0.0) for n in range(1, 600)]
    sampler = scripted(Scripted(read), monkeypatch, [max(times[: n + 1]) for n in range(len(times))])
    assert sampler.missed >= 59
    assert sampler.malformed >= 59
    assert sampler.joules == pytest.approx(known.joules(sampler.last) - known.joules(sampler.first), rel=0.02)


def test_a_ramp_is_integrated_by_trapezoids_and_so_is_each_span(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = scripted(Scripted(lambda t: [6.0 * t, 4.0 * t]), monkeypatch, [0.0, 1.0, 3.0, 3.5])
    assert sampler.joules == pytest.approx(10.0 * 3.5**2 / 2)
    assert sampler.devices == pytest.approx((6.0 * 3.5**2 / 2, 4.0 * 3.5**2 / 2))
    assert sampler.gap == 2.0
    for begin, end in [(0.0, 3.5), (0.25, 0.5), (0.5, 3.25), (1.0, 3.0), (2.0, 2.0)]:
        assert sampler.energy(begin, end) == pytest.approx(5.0 * (end**2 - begin**2))
    steps = [sampler.energy(t / 10, (t + 1) / 10) for t in range(35)]
    assert math.fsum(step for step in steps if step is not None) == pytest.approx(sampler.joules, rel=1e-9), "the steps' sum is the run's"
    assert sampler.energy(3.0, 3.6) is None, "no sample covers the end yet"
    assert sampler.energy(-0.1, 1.0) is None


def test_a_source_that_counts_energy_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = scripted(Scripted(lambda t: [{0.0: 7.0, 1.0: 100.0, 3.0: 80.0}[t]], counts=True), monkeypatch, [0.0, 1.0, 3.0])
    assert sampler.joules == 180.0, "the first reading counts what came before"
    assert sampler.energy(0.5, 2.0) == pytest.approx(50.0 + 40.0)


def test_the_smoothed_power_forgets_with_its_time_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = scripted(Scripted(lambda t: [100.0 if t < 1.0 else 200.0]), monkeypatch, [0.0, 0.5, 1.0, 3.0], smoothing=2.0)
    after = math.exp(-0.25) * 100.0 + (1 - math.exp(-0.25)) * 200.0
    assert sampler.watts == pytest.approx(math.exp(-1.0) * after + (1 - math.exp(-1.0)) * 200.0)


def test_history_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power_module, "HISTORY", 8)
    sampler = scripted(Scripted(lambda t: [10.0]), monkeypatch, [float(t) for t in range(100)])
    assert len(sampler._times) <= 16
    assert sampler.joules == pytest.approx(990.0)
    assert sampler.energy(95.0, 99.0) == pytest.approx(40.0)
    assert sampler.energy(0.0, 99.0) is None


def test_a_board_that_appears_or_vanishes_is_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = {0.0: [10.0, 20.0], 1.0: [10.0], 2.0: [10.0, 20.0], 3.0: [math.nan, 1.0]}
    sampler = scripted(Scripted(lambda t: boards[t]), monkeypatch, list(boards))
    assert sampler.malformed == 2
    assert sampler.joules == pytest.approx(60.0)


def test_bad_samples_are_counted_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    answers = 'case $((n%4)) in 1) echo "[N/A]";; 2) exit 1;; 3) echo garbage;; *) echo 80;; esac'
    body = f"n=$(cat {count} 2>/dev/null || echo 0); echo $((n+1)) > {count}; {answers}"
    stand_in(tmp_path, body, monkeypatch)
    with PowerSampler(interval=0.01, source="nvidia-smi") as sampler:
        while sampler.samples < 3:
            time.sleep(0.01)
    assert sampler.missed >= 2
    assert sampler.malformed >= 4
    assert sampler.joules == pytest.approx(80.0 * (sampler.last - sampler.first), rel=1e-9)


def runs(status: Path) -> bool:
    """Whether the process of a /proc/PID/status file is neither gone nor a zombie that init has not reaped yet."""
    try:
        return "Z (zombie)" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, f"sleep 60 & echo $! >> {tmp_path}/children; wait", monkeypatch)
    monkeypatch.setattr(sources_module, "TIMEOUT", 0.2)
    begin = time.monotonic()
    with PowerSampler(interval=0.01, source="nvidia-smi") as sampler:
        pass
    assert time.monotonic() - begin < 20
    assert sampler.joules is None
    assert "0 good samples, 2 unanswered" in str(sampler.reason)
    assert "mango-power" not in [thread.name for thread in threading.enumerate()]
    # The kernel ends a killed process when it next runs it, which is after the signal was sent: they have seconds, of their sixty.
    children = [Path(f"/proc/{child}/status") for child in (tmp_path / "children").read_text().split()]
    assert children
    while alive := [child for child in children if runs(child)]:
        assert time.monotonic() - begin < 30, f"still running: {alive}"
        time.sleep(0.01)


def test_an_error_inside_the_block_stops_the_thread_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "echo 10", monkeypatch)
    with pytest.raises(RuntimeError), PowerSampler(interval=0.01, source="nvidia-smi"):
        raise RuntimeError
    assert "mango-power" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.slow  # a share of time, which a machine that runs other tests beside it falsifies
def test_sampling_takes_less_than_a_hundredth_of_five_millisecond_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the default ten samples a second: the processor time of the sampling thread, which is all that it can take from the steps.

    nvidia-smi itself runs beside them, on a core of its own.
    """
    stand_in(tmp_path, "echo 100.0", monkeypatch)
    with PowerSampler(source="nvidia-smi") as sampler:
        begin = time.monotonic()
        while time.monotonic() < begin + 2.0:
            end = time.monotonic() + 0.005
            while time.monotonic() < end:  # a step that holds the interpreter, as a training step's Python does
                pass
        seconds = time.monotonic() - begin
    assert sampler.samples >= 10
    assert sampler.busy / seconds < 0.01


def test_nvml_reads_every_board_and_its_errors_are_missed_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    milliwatts, calls = {0: 70_000, 1: 30_000}, [0]

    def power(board: int) -> int:
        calls[0] += 1
        if calls[0] in (9, 10):
            raise nvml.NVMLError("lost")
        return milliwatts[board]

    functions = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: calls.append(-1),
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda board: board,
        "nvmlDeviceGetPowerUsage": power,
    }
    for name, function in functions.items():
        setattr(nvml, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with PowerSampler(interval=0.01) as sampler:
        while sampler.samples < 10:
            time.sleep(0.01)
    assert sampler.source == "nvml", "the first source of auto"
    seconds = sampler.last - sampler.first
    assert sampler.devices == pytest.approx((70.0 * seconds, 30.0 * seconds), rel=1e-9)
    assert sampler.missed == 2
    assert calls[-1] == -1, "the library is shut down"


def test_counters_of_energy_are_differenced_and_wrap_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0, which would be counted twice
    package.mkdir()
    (package / "max_energy_range_uj").write_text("1000000\n")
    (package / "energy_uj").write_text("900000\n")
    monkeypatch.setattr(sources_module, "RAPL", tmp_path)
    with PowerSampler(interval=30.0, source="rapl") as sampler:
        (package / "energy_uj").write_text("400000\n")
        time.sleep(0.05)
    assert sampler.joules == pytest.approx(0.5)


def test_no_source_gives_null_with_the_reasons_and_never_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "RAPL", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with PowerSampler(source="rapl") as sampler:
        pass
    assert (sampler.joules, sampler.source, sampler.watts, sampler.devices) == (None, None, None, None)
    assert "has no counters" in str(sampler.reason)
    with PowerSampler(source="nvidia-smi") as sampler:
        pass
    assert "no such program" in str(sampler.reason)
    with pytest.raises(ConfigError, match=r"energy = 'require' is not legal: a machine with a power source.*has no counters"):
        PowerSampler(source="rapl", require=True).__enter__()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"source": "tdp"}, "one of auto, nvml"), ({"interval": 0.0}, "seconds, above 0"), ({"smoothing": -1.0}, "smoothing = -1.0")],
)
def test_bad_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PowerSampler(**options)  # type: ignore[arg-type]

"""Energy by sampling: a thread reads a power source. Where there is none the energy is None, with the reason; it is never estimated."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mango.errors import ConfigError

SOURCES = ("auto", "nvml", "nvidia-smi", "rapl")
RAPL = Path("/sys/class/powercap")
QUERY = ("--query-gpu=power.draw", "--format=csv,noheader,nounits")
TIMEOUT = 5.0  # seconds that nvidia-smi may take before the sample counts as missed


class Reader(Protocol):
    """A power source.

    Attributes:
        mean: whether ``watts`` is the mean since the last reading (integrated by rectangles) and not the power now (by trapezoids).
    """

    mean: bool

    def watts(self) -> float:
        """Power now, all devices together. Raises: OSError or ValueError when this sample fails."""

    def close(self) -> None: ...


class Unavailable(Exception):
    """A source does not exist here; the message is the reason."""


class PowerSampler:
    """Measures the energy of what happens inside its ``with`` block.

    Energy is the trapezoidal integral of sampled power over time (exact differences where the source counts energy), with a sample at both
    ends. Samples that fail are counted, and the line is drawn through the good ones around them.

    Args:
        interval: seconds between samples.
        source: "nvml", "nvidia-smi" (GPU boards), "rapl" (CPU packages), or "auto" for the first of these that exists.

    Attributes:
        source: what is measured, or None.
        reason: why there is no source, or None.
        samples, missed: good and failed samples.
        first, last: when the first and the last good sample were taken (monotonic seconds): the span that ``joules`` covers.

    Raises: ConfigError for an unknown source or a non-positive interval.
    """

    def __init__(self, interval: float = 0.1, source: str = "auto") -> None:
        if source not in SOURCES:
            raise ConfigError.of("source", source, "one of " + ", ".join(SOURCES))
        if not interval > 0:
            raise ConfigError.of("interval", interval, "seconds, above 0")
        self.interval = interval
        self.source: str | None = None
        self.reason: str | None = None
        self.samples = 0
        self.missed = 0
        self.first = self.last = 0.0
        self._wanted = source
        self._joules = 0.0
        self._watts = 0.0  # of the last good sample
        self._reader: Reader | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @property
    def joules(self) -> float | None:
        """Energy so far; None when nothing could be measured."""
        with self._lock:
            return self._joules if self.samples >= 2 else None

    def __enter__(self) -> PowerSampler:
        reasons = []
        for name in _OPEN if self._wanted == "auto" else (self._wanted,):
            try:
                self._reader = _OPEN[name]()
            except Unavailable as absent:
                reasons.append(f"{name}: {absent}")
                continue
            self.source = name
            break
        else:
            self.reason = "; ".join(reasons)
            return self
        self._sample()
        self._thread = threading.Thread(target=self._run, name="mango-power", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is None or self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._sample()
        self._reader.close()
        if self.samples < 2:
            self.source, self.reason = None, f"{self.source} gave {self.samples} good samples and {self.missed} bad ones"

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        assert self._reader is not None
        try:
            watts = self._reader.watts()
        except (OSError, ValueError):
            self.missed += 1
            return
        now = time.monotonic()
        with self._lock:
            if self.samples:
                mean = watts if self._reader.mean else (watts + self._watts) / 2
                self._joules += (now - self.last) * mean
            else:
                self.first = now
            self.last, self._watts = now, watts
            self.samples += 1


class _Nvml:
    mean = False

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise Unavailable("nvidia-ml-py is not installed") from error
        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            self.boards = [pynvml.nvmlDeviceGetHandleByIndex(board) for board in range(pynvml.nvmlDeviceGetCount())]
            self.watts()
        except (pynvml.NVMLError, OSError) as error:
            raise Unavailable(str(error)) from error

    def watts(self) -> float:
        try:
            return sum(self.nvml.nvmlDeviceGetPowerUsage(board) for board in self.boards) / 1000
        except self.nvml.NVMLError as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        self.nvml.nvmlShutdown()


class _NvidiaSmi:
    mean = False

    def __init__(self) -> None:
        program = shutil.which("nvidia-smi")
        if program is None:
            raise Unavailable("no such program on PATH")
        self.program = program

    def watts(self) -> float:
        # Its own process group: a program that hangs is killed with its children, which would otherwise hold the pipe open.
        process = subprocess.Popen(
            [self.program, *QUERY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise OSError("no answer") from error
        if process.returncode != 0:
            raise OSError(f"exit code {process.returncode}")
        readings = [float(line) for line in output.splitlines() if line.strip()]
        if not readings:
            raise ValueError("no reading")
        return sum(readings)

    def close(self) -> None:
        pass


class _Rapl:
    """Linux's counters of energy per CPU package, which wrap around."""

    mean = True

    def __init__(self) -> None:
        self.counters = [path / "energy_uj" for path in sorted(RAPL.glob("intel-rapl:*")) if path.name.count(":") == 1]
        if not self.counters:
            raise Unavailable(f"{RAPL} has no counters")
        try:
            self.ranges = [int((path.parent / "max_energy_range_uj").read_text()) for path in self.counters]
            self.before = self._read()
        except OSError as error:
            raise Unavailable(f"{error.filename} is not readable") from error

    def _read(self) -> tuple[float, list[int]]:
        return time.monotonic(), [int(path.read_text()) for path in self.counters]

    def watts(self) -> float:
        (then, old), (now, new) = self.before, self._read()
        self.before = now, new
        used = sum((b - a) % wrap for a, b, wrap in zip(old, new, self.ranges, strict=True))
        return used * 1e-6 / max(now - then, 1e-9)

    def close(self) -> None:
        pass


_OPEN: dict[str, Callable[[], Reader]] = {"nvml": _Nvml, "nvidia-smi": _NvidiaSmi, "rapl": _Rapl}

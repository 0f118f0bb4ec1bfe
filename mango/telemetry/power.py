"""Energy by sampling: a thread reads a power source. Where there is none the energy is None, with the reason; it is never estimated."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_right

from mango.errors import ConfigError
from mango.telemetry.sources import READERS, Reader, Unavailable

SOURCES = ("auto", *READERS)
HISTORY = 1 << 16  # samples that are kept for ``energy(begin, end)``: almost two hours at ten a second


class PowerSampler:
    """Measures the energy of what happens inside its ``with`` block.

    Energy is the trapezoidal integral of sampled power over time (exact differences where the source counts energy), with a sample at both
    ends. Samples that fail are counted, and the line is drawn through the good ones around them. Every method may be called from any
    thread while the sampler runs.

    Args:
        interval: seconds between samples.
        source: "nvml", "nvidia-smi" (GPU boards), "rapl" (CPU packages), or "auto" for the first of these that exists.
        smoothing: time constant of ``watts``, seconds.
        require: whether it is an error that nothing can be measured.

    Attributes:
        source: what is measured, or None.
        reason: why there is no source, or None.
        samples: good ones. missed: the source gave no answer. malformed: the answer was not one number for each device.
        first, last: when the first and the last good sample were taken (monotonic seconds): the span that ``joules`` covers.
        gap: longest time between two good samples, seconds.
        busy: processor seconds that the sampling thread has used, its child processes not counted.

    Raises: ConfigError for an unknown source, an interval or a time constant that is not positive, or, on entry, when a source is
        required and there is none.
    """

    def __init__(self, interval: float = 0.1, source: str = "auto", smoothing: float = 1.0, require: bool = False) -> None:
        if source not in SOURCES:
            raise ConfigError.of("source", source, "one of " + ", ".join(SOURCES))
        for field, value in (("interval", interval), ("smoothing", smoothing)):
            if not value > 0:
                raise ConfigError.of(field, value, "seconds, above 0")
        self.interval, self.smoothing, self.require = interval, smoothing, require
        self.source: str | None = None
        self.reason: str | None = None
        self.samples = self.missed = self.malformed = 0
        self.first = self.last = self.gap = self.busy = 0.0
        self._wanted = source
        self._devices: list[float] = []  # joules of each device
        self._now: list[float] = []  # what the source said of each device at the last good sample
        self._smooth: float | None = None
        self._times: list[float] = []  # of good samples, with the watts then and the joules until then, all devices together
        self._watts: list[float] = []
        self._total: list[float] = []
        self._reader: Reader | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._reading = threading.Lock()  # one reading at a time: sources keep what they read last
        self._lock = threading.Lock()

    @property
    def joules(self) -> float | None:
        """Energy so far; None when nothing could be measured."""
        with self._lock:
            return self._total[-1] if self.samples >= 2 else None

    @property
    def devices(self) -> tuple[float, ...] | None:
        """Energy of each device so far, in the source's order; None when nothing could be measured."""
        with self._lock:
            return tuple(self._devices) if self.samples >= 2 else None

    @property
    def watts(self) -> float | None:
        """Exponentially weighted mean of the power of all devices: a sample of age t weighs exp(-t / smoothing)."""
        with self._lock:
            return self._smooth

    def energy(self, begin: float, end: float) -> float | None:
        """Joules between two times (``time.monotonic()``), for a step or an epoch.

        None where the samples do not cover the span: before the first, after the last, or longer ago than HISTORY samples. A span that
        has only just ended is covered by the next sample; ``sample()`` takes one at once.
        """
        with self._lock:
            if not self._times or not self._times[0] <= begin <= end <= self._times[-1]:
                return None
            return self._until(end) - self._until(begin)

    def sample(self) -> None:
        """Take a sample now, in the calling thread."""
        if self._reader is not None:
            self._sample()

    def __enter__(self) -> PowerSampler:
        reasons = []
        for name in READERS if self._wanted == "auto" else (self._wanted,):
            try:
                self._reader = READERS[name]()
            except Unavailable as absent:
                reasons.append(f"{name}: {absent}")
                continue
            self.source = name
            break
        else:
            self.reason = "; ".join(reasons)
            if self.require:
                raise ConfigError.of("energy", "require", f"a machine with a power source that can be read; here {self.reason}")
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
        self._reader = None
        if self.samples < 2:
            faults = f"{self.missed} unanswered and {self.malformed} malformed"
            self.source, self.reason = None, f"{self.source} gave {self.samples} good samples, {faults} ones"

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()
            self.busy = time.thread_time()

    def _sample(self) -> None:
        reader = self._reader
        assert reader is not None
        with self._reading:
            begin = time.monotonic()
            try:
                values = reader.read()
                if len(values) != len(self._now or values) or not all(map(math.isfinite, values)):
                    raise ValueError("not a finite number for each device")
            except OSError:
                self.missed += 1
                return
            except ValueError:
                self.malformed += 1
                return
            now = (begin + time.monotonic()) / 2  # it was read somewhere in between
            with self._lock:
                self._add(now, values, reader.counts)

    def _add(self, now: float, values: list[float], counts: bool) -> None:
        total, power = 0.0, sum(values)
        if self.samples:
            seconds = now - self.last
            self.gap = max(self.gap, seconds)
            each = values if counts else [seconds * (a + b) / 2 for a, b in zip(self._now, values, strict=True)]
            self._devices = [a + b for a, b in zip(self._devices, each, strict=True)]
            total = self._total[-1] + sum(each)
            if counts:  # the mean power since the last sample
                power = self._watts[-1] = sum(each) / seconds
            keep = math.exp(-seconds / self.smoothing)
            self._smooth = power if self._smooth is None else keep * self._smooth + (1.0 - keep) * power
        else:
            self.first, self._devices = now, [0.0] * len(values)
            self._smooth = None if counts else power  # what a counter said before the first sample belongs to no span
        self.last, self._now = now, values
        self.samples += 1
        for values, value in ((self._times, now), (self._watts, power), (self._total, total)):
            values.append(value)
            if len(values) > 2 * HISTORY:
                del values[:HISTORY]

    def _until(self, moment: float) -> float:
        """Joules from the first sample to a moment between two: the integral of the line that ``_add`` integrated."""
        place = bisect_right(self._times, moment) - 1
        if place == len(self._times) - 1:
            return self._total[-1]
        t0, t1 = self._times[place : place + 2]
        w0, e0, e1 = self._watts[place], self._total[place], self._total[place + 1]
        share = (moment - t0) / (t1 - t0)
        # a parabola from (t0, e0) with slope w0 to (t1, e1); for a source that counts energy slope and secant are equal
        return e0 + share * (t1 - t0) * w0 + share**2 * (e1 - e0 - (t1 - t0) * w0)

"""Where power can be read: GPU boards through NVML or nvidia-smi, CPU packages through Linux's RAPL counters."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

RAPL = Path("/sys/class/powercap")
QUERY = ("--query-gpu=power.draw", "--format=csv,noheader,nounits")
TIMEOUT = 5.0  # seconds that nvidia-smi may take before the sample counts as missed


class Reader(Protocol):
    """A power source.

    Attributes:
        counts: whether ``read`` gives the joules since the last reading, and not the watts now.
    """

    counts: bool

    def read(self) -> list[float]:
        """One value for each device. Raises: OSError when nothing answers, ValueError when the answer is not a number for each device."""

    def close(self) -> None: ...


class Unavailable(Exception):
    """A source does not exist here; the message is the reason."""


class Nvml:
    """NVIDIA's management library, as nvidia-ml-py binds it."""

    counts = False

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise Unavailable("nvidia-ml-py is not installed") from error
        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            self.boards = [pynvml.nvmlDeviceGetHandleByIndex(board) for board in range(pynvml.nvmlDeviceGetCount())]
            self.read()
        except (pynvml.NVMLError, OSError) as error:
            raise Unavailable(str(error)) from error
        if not self.boards:
            raise Unavailable("the driver knows no board")

    def read(self) -> list[float]:
        try:
            return [self.nvml.nvmlDeviceGetPowerUsage(board) / 1000 for board in self.boards]
        except self.nvml.NVMLError as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        self.nvml.nvmlShutdown()


class NvidiaSmi:
    """The command line of NVIDIA's driver: one process a sample, as it has no other interface that can be told apart from a hang."""

    counts = False

    def __init__(self) -> None:
        program = shutil.which("nvidia-smi")
        if program is None:
            raise Unavailable("no such program on PATH")
        self.program = program

    def read(self) -> list[float]:
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
        readings = [float(line) for line in output.splitlines() if line.strip()]  # "[N/A]" is a ValueError
        if not readings:
            raise ValueError("no reading")
        return readings

    def close(self) -> None:
        pass


class Rapl:
    """Linux's counters of energy per CPU package, which wrap around."""

    counts = True

    def __init__(self) -> None:
        self.counters = [path / "energy_uj" for path in sorted(RAPL.glob("intel-rapl:*")) if path.name.count(":") == 1]
        if not self.counters:
            raise Unavailable(f"{RAPL} has no counters")
        try:
            self.ranges = [int((path.parent / "max_energy_range_uj").read_text()) for path in self.counters]
            self.before = self._counts()
        except OSError as error:
            raise Unavailable(f"{error.filename} is not readable") from error

    def _counts(self) -> list[int]:
        return [int(path.read_text()) for path in self.counters]

    def read(self) -> list[float]:
        old, self.before = self.before, self._counts()
        return [(new - then) % wrap * 1e-6 for then, new, wrap in zip(old, self.before, self.ranges, strict=True)]

    def close(self) -> None:
        pass


READERS: dict[str, Callable[[], Reader]] = {"nvml": Nvml, "nvidia-smi": NvidiaSmi, "rapl": Rapl}

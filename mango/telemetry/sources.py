"""Where power can be read: GPU boards through NVML or nvidia-smi, CPU packages through Linux's RAPL counters."""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
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
        # Spawned by hand: subprocess takes twice the processor time, which at ten samples a second is over one percent of a core. A session
        # of its own: a program that hangs is killed with its children, which would otherwise hold the pipe open.
        end = time.monotonic() + TIMEOUT
        reading, writing = os.pipe()
        try:
            actions = [(os.POSIX_SPAWN_DUP2, writing, 1), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
            child = os.posix_spawn(self.program, [self.program, *QUERY], os.environ, file_actions=actions, setsid=True)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        try:
            output = _until_closed(reading, end)
            status = _exit_code(child, end)
        except TimeoutError:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            _until_closed(reading, time.monotonic() + TIMEOUT)  # its children are gone too
            raise
        finally:
            os.close(reading)
        if status != 0:
            raise OSError(f"exit code {status}")
        readings = [float(line) for line in output.splitlines() if line.strip()]  # "[N/A]" is a ValueError
        if not readings:
            raise ValueError("no reading")
        return readings

    def close(self) -> None:
        pass


def _until_closed(pipe: int, end: float) -> str:
    """What is written into a pipe. Raises: TimeoutError when it is still open at ``end`` (monotonic seconds)."""
    ready = select.poll()
    parts: list[bytes] = []
    ready.register(pipe)
    while ready.poll(max(0.0, 1000 * (end - time.monotonic()))):
        part = os.read(pipe, 1 << 16)
        if not part:
            return b"".join(parts).decode(errors="replace")
        parts.append(part)
    raise TimeoutError("no answer")


def _exit_code(child: int, end: float) -> int:
    """Of a process that has closed its output, or minus the signal that ended it. Raises: TimeoutError when it runs on at ``end``."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            raise TimeoutError("no exit")
        time.sleep(0.001)


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

"""What surrounds the loop: determinism, signals and the folder that a run writes to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from mango.errors import ConfigError
from mango.training import atomic

RECORD, METRICS, CHECKPOINT, MODEL, MEMORY = "run.json", "metrics.jsonl", "checkpoint.pt", "model.pt", "memory.csv"


class Interrupted(Exception):
    """A signal asked the run to stop; it stopped after a whole step and wrote a checkpoint."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; continue with --resume from {checkpoint}")
        self.number = number


class Stop:
    """Remembers the first SIGINT or SIGTERM instead of dying of it. A second one acts as it would have without us."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle both signals inside this block (in the main thread; elsewhere python does not allow it)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, frame: FrameType | None) -> None:
            self.number = number
            for each, handler in previous.items():
                signal.signal(each, handler)

        for number in previous:
            signal.signal(number, handle)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """A fixed number of threads, on which sums depend; the caller's comes back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms where torch has them; the caller's setting comes back afterwards."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def choose_device(name: str) -> torch.device:
    """The device that a configuration means. Raises: ConfigError when CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError.of("train.device", name, "auto or cpu, torch finds no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def open_folder(out: Path, *, resume: bool, force: bool) -> None:
    """Make the output folder ready before any work is done.

    Raises: ConfigError when it holds a run and neither ``resume`` nor ``force`` is given; OSError when it cannot be written.
    """
    if resume and force:
        raise ConfigError.of("--resume and --force", "both", "one of them: continue a run, or start it over")
    present = [name for name in (RECORD, METRICS, CHECKPOINT, MODEL, MEMORY) if (out / name).exists()]
    if present and not resume and not force:
        raise ConfigError.of(
            "--out", str(out), f"a folder without a run (it holds {', '.join(present)}); --resume continues it, --force starts it over"
        )
    atomic.require_writable(out)
    if force:
        for name in present:
            (out / name).unlink()

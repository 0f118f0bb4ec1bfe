"""Wall time by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the wall time of named phases: ``with clock("backward"): ...``. Phases may be nested; each counts its whole block.

    Args:
        device: what ``sync`` waits for; on a CPU there is nothing to wait for.
        sync: wait for the device before and after each phase. Without it a phase on an accelerator takes as long as queueing its work
            does; with it the phases are true and the step as a whole is slower.

    Attributes:
        seconds, counts: by phase.
    """

    def __init__(self, device: torch.device | str = "cpu", sync: bool = False) -> None:
        self.device = torch.device(device)
        self.sync = sync
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[phase] += time.perf_counter() - begin
            self.counts[phase] += 1

    def _wait(self) -> None:
        if self.sync and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

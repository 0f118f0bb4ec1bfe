"""Paired timing: candidates take turns, so that what else the machine does hits all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from mango.errors import ConfigError


@dataclass(frozen=True)
class Paired:
    """Seconds of every run, by candidate, in the order of the rounds."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median seconds of one candidate."""
        return median(self.seconds[name])

    def worst(self, name: str) -> float:
        """Seconds of its slowest run."""
        return max(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of time(name) / time(base): above 1 means slower than the base."""
        return median(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))


def paired(functions: Mapping[str, Callable[[], object]], repeats: int = 7, warmup: int = 2) -> Paired:
    """Times each function once a round, after ``warmup`` rounds that do not count; every second round runs in reverse order.

    Args:
        functions: candidates by name. A function that computes on a CUDA device is waited for.
        repeats: rounds that count, at least 1.
        warmup: rounds before them.

    Raises:
        ConfigError: for fewer rounds than that.
    """
    for field, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ConfigError.of(field, value, f"an integer >= {least}")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, repeats):
        for name in functions if turn % 2 == 0 else reversed(list(functions)):
            start = perf_counter()
            functions[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(perf_counter() - start)
    return Paired({name: tuple(times) for name, times in seconds.items()})

"""Runs a compiled loop over a range, cut among as many threads as torch uses.

The loops release Python's lock, so plain threads run side by side. numba's own parallel loops would do the same after compiling ten times
as long, on a second OpenMP runtime whose waiting threads compete with torch's for the processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch

GRAIN = 1 << 15  # values for which another thread pays, as in torch
_pool: ThreadPoolExecutor | None = None


def run(loop: Callable[..., None], count: int, each: int, *arguments: Any) -> None:
    """``loop(first, last, *arguments)`` over 0..count, in parts that are run side by side; ``each`` is the values behind one of them."""
    parts = max(1, min(torch.get_num_threads(), count * each // GRAIN))
    bounds = [count * part // parts for part in range(parts + 1)]
    jobs = [_workers().submit(loop, first, last, *arguments) for first, last in pairwise(bounds[1:])]
    loop(bounds[0], bounds[1], *arguments)
    for job in jobs:
        job.result()


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), "mango-native")
    return _pool


def _forget() -> None:
    """Threads do not survive a fork: the child starts its own."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)

"""Runs a compiled loop over a range, cut among as many threads as torch uses.

The loops release Python's lock, so they run side by side on any threads. Torch's own are the best: after an operation of torch they
spin for milliseconds, waiting for more work, and threads of ours would share the processor with them (loops then take up to twice as
long). Where torch's OpenMP is GNU's, its team is therefore asked for through the library that torch has loaded; elsewhere, and in a
forked child, where that team does not exist, a pool of ours does the work. numba's own parallel loops take ten times as long to compile.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
GRAIN = 1 << 15  # values for which another thread pays, as in torch
_pool: ThreadPoolExecutor | None = None
_forked = False


def run(loop: Callable[..., None], count: int, each: int, *arguments: Tensor | int | float) -> None:
    """``loop(first, last, *arguments)`` over 0..count, in parts that are run side by side; ``each`` is the values behind one of them.

    Arguments: tensors on the CPU, which the loop sees as arrays; int; float, which it sees as float32.
    """
    parts = max(1, min(torch.get_num_threads(), count * each // GRAIN))
    library = None if parts == 1 or _forked else _openmp()
    if library is not None:
        from mango.native import team

        team.run(library, loop, count, parts, arguments)
        return
    seen = [_as_numpy(argument) for argument in arguments]
    if parts == 1:
        loop(0, count, *seen)
        return
    bounds = pairwise(count * part // parts for part in range(parts + 1))
    for job in [_workers().submit(loop, first, last, *seen) for first, last in bounds]:
        job.result()


def _as_numpy(argument: Tensor | int | float) -> Any:
    if isinstance(argument, Tensor):
        return argument.numpy()
    return np.float32(argument) if isinstance(argument, float) else argument


def on_team(work: Callable[[int], None], threads: int) -> bool:
    """``work(number)``, number < threads, on each thread of torch's OpenMP team. False, and nothing is done, where it cannot be had.

    Python's lock is theirs to share. What ``work`` raises is lost. Within, torch's own operations have a thread each.
    """
    library = _openmp()
    if library is None or _forked:
        return False
    library.GOMP_parallel(_CALL(lambda _: work(library.omp_get_thread_num())), None, threads, 0)
    return True


@cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP library, if torch has loaded it."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    bundled = sorted(path.name for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    for name in (*bundled, "libgomp.so.1"):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)  # by soname, of what is in memory already: never a second runtime
        except OSError:
            continue
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.omp_get_thread_num.restype = ctypes.c_int
        return library
    return None


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), "mango-native")
    return _pool


def _forget() -> None:
    """Threads do not survive a fork: the child starts its own."""
    global _pool, _forked
    _pool, _forked = None, True


os.register_at_fork(after_in_child=_forget)

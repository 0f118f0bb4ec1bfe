"""How many threads the compiled loops run on."""

from __future__ import annotations

import numba

LAUNCHED = numba.get_num_threads()  # the most that numba allows


def use(count: int) -> None:
    """As many as torch uses, which a job of the workflow sets through OMP_NUM_THREADS."""
    numba.set_num_threads(max(1, min(count, LAUNCHED)))

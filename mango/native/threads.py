"""How many threads the compiled loops run on."""

from __future__ import annotations

import numba
import torch

# Asking numba for its count starts its threads, and that sets the count of the OpenMP runtime, which torch may share: a run on one thread
# would go on with all cores from its first compiled loop on, at other sums and, on a busy machine, at a fraction of the speed.
_torchs = torch.get_num_threads()
LAUNCHED = numba.get_num_threads()  # the most that numba allows
torch.set_num_threads(_torchs)


def use(count: int) -> None:
    """As many as torch uses, which a job of the workflow sets through OMP_NUM_THREADS."""
    numba.set_num_threads(max(1, min(count, LAUNCHED)))

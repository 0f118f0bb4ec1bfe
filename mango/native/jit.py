"""How the loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(loop: Callable[..., None]) -> Any:
    """Machine code without Python's lock, with the division of IEEE 754, kept on disk where numba finds a folder that it may write."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(loop)
    except RuntimeError:  # a read-only installation and no home: compiled anew in each process
        return njit(nogil=True, error_model="numpy")(loop)

"""How the loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(loop: Callable[..., Any], fastmath: bool | set[str] = False) -> Any:
    """Machine code without Python's lock, with the division of IEEE 754, kept on disk where numba finds a folder that it may write."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True, fastmath=fastmath)(loop)
    except RuntimeError:  # a read-only installation and no home: compiled anew in each process
        return njit(nogil=True, error_model="numpy", fastmath=fastmath)(loop)


def summing(loop: Callable[..., Any]) -> Any:
    """``compiled`` for a sum whose order the compiler may choose: it takes several terms at a time."""
    return compiled(loop, {"reassoc"})

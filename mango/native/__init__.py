"""Compiled CPU loops that read each value once, used where numba is installed (``pip install '.[native]'``) and MANGO_NATIVE is not 0.

Every loop has a twin in torch, which runs everywhere else and computes the same bits; ``tests/test_native.py`` holds them to that. The
machine code is compiled when a loop is first called and cached on disk. The modules here import numba: import them inside functions,
behind ``ready``.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

BAND = 64  # rows whose columns are summed together: sums are the same for any number of threads


def ready(device: torch.device) -> bool:
    """Whether the compiled loops are to be used for tensors on this device."""
    return device.type == "cpu" and _installed()


def float_bits(x: Tensor) -> Tensor:
    """x in float32 or bfloat16 as integers for a compiled loop: int32, or int16, the upper half of the bits of a float32."""
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


@cache
def _installed() -> bool:
    if os.environ.get("MANGO_NATIVE", "1") == "0" or find_spec("numba") is None:
        return False
    try:
        import_module("numba")
    except ImportError as error:  # numba refuses a numpy that is newer than itself
        warnings.warn(f"numba does not load, so the CPU loops run in torch: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True

"""Compiled CPU loops that read each value once, used where numba is installed (``pip install '.[native]'``) and MANGO_NATIVE is not 0.

Every loop has a twin in torch, which runs everywhere else and computes the same bits; ``tests/test_native.py`` holds them to that. The
machine code is compiled when a loop is first called and cached on disk. The modules here import numba: import them inside functions,
behind ``ready``.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch


def ready(device: torch.device) -> bool:
    """Whether the compiled loops are to be used for tensors on this device."""
    return device.type == "cpu" and _installed()


@cache
def _installed() -> bool:
    return os.environ.get("MANGO_NATIVE", "1") != "0" and find_spec("numba") is not None

"""Learning-rate schedules as closed forms of the step: nothing to store, nothing to restore."""

from __future__ import annotations

import math


def factor(step: int, steps: int, kind: str, warmup: int, floor: float) -> float:
    """Multiplier of the learning rate for step ``step`` (from 0) of ``steps``.

    Linear warm-up over ``warmup`` steps, whose first is 1 / warmup; then "cosine" or "linear" from 1 down to ``floor``, or "constant" 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    shape = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return floor + (1 - floor) * shape

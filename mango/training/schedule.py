"""Learning-rate schedules as closed forms of the step: nothing to store, nothing to restore."""

from __future__ import annotations

import math


def factor(step: int, steps: int, kind: str, warmup: int, floor: float, warmdown: float = 1.0) -> float:
    """Multiplier of the learning rate for step ``step`` (from 0) of ``steps``.

    Linear warm-up over ``warmup`` steps, whose first is 1 / warmup; then "cosine" or "linear" from 1 down to ``floor``, "constant" 1, or
    "warmdown": constant, and linear over the last share ``warmdown`` of the steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    start = max(warmup, round(steps * (1 - warmdown))) if kind == "warmdown" else warmup
    progress = max(0.0, (step - start) / max(1, steps - start))
    shape = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return floor + (1 - floor) * shape

"""The published codebooks in exact arithmetic, and T1's form: the worst case of rounding to them with an absmax scale."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product
from math import sqrt
from typing import Any

# Kept apart from mango's own so that a slip in either shows. NF4: dettmers2023qlora, appendix E (float32 values);
# FP4 and the signed dynamic map (7 exponent positions, no -1): dettmers2022optimizers and bitsandbytes, here in exact decimals.
NF4 = tuple(
    Fraction(level)
    for level in (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
)
FP4 = tuple(sorted({sign * Fraction(n, 192) for sign in (1, -1) for n in (0, 1, 32, 48, 64, 96, 128, 192)}))
DYNAMIC = tuple(
    sorted(
        {Fraction(0), Fraction(1)}
        | {
            sign * Fraction(10) ** (decade - 6) * (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * k + 1, 2 * 2**decade))
            for sign, decade in product((1, -1), range(7))
            for k in range(2**decade)
        }
    )
)
TABLE = Fraction(1, 65535)  # half a cell of the CPU table, in units of absmax


def worst_case(levels: Sequence[Any], block: int, displacement: Any = 0) -> tuple[Any, Any, Any]:
    """1 - alpha by the form, with the sign s and the midpoint m of a worst block (s, m, ..., m); exact for rational levels.

    With ``displacement`` eta > 0: the safe bound for thresholds that are off by at most eta.
    """
    c, candidates = block - 1, []
    for s in (1, -1):
        e = min(abs(s - level) for level in levels)
        candidates.append((e * e, s, 0 * e))
        for low, high in pairwise(levels):
            m, h = (low + high) / 2, (high - low) / 2
            near = max(abs(m) - displacement, 0 * m)
            candidates.append(((e * e + c * (h + displacement) ** 2) / (1 + c * near * near), s, m))
    return max(candidates, key=lambda candidate: candidate[0])


def contraction(levels: Sequence[Any], block: int) -> Any:
    """alpha by the form."""
    return 1 - worst_case(levels, block)[0]


def inexact(error: float, unit: float) -> float:
    """1 - alpha' of an operator with 1 - alpha = error whose output is rounded with this unit roundoff."""
    return (sqrt(error) + unit * (1.0 + sqrt(error))) ** 2


def displaced_worst_case(levels: Sequence[float], thresholds: Sequence[float], block: int) -> float:
    """The form with each gap's own threshold t in place of its midpoint: exact for any rounding whose cells are intervals."""
    c, worst = block - 1, 0.0
    for e in (1.0 - levels[-1], levels[0] + 1.0):
        for low, high, t in zip(levels, levels[1:], thresholds, strict=False):
            worst = max(worst, (e * e + c * max(t - low, high - t) ** 2) / (1 + c * t * t), e * e)
    return worst

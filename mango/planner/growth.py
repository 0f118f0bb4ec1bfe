"""How a trace grows with the length or the number of inputs: three runs, one to check, then arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mango.planner.trace import Trace

LIMIT = 1 << 30  # beyond every card here


class Growth:
    """Traces at any size, from a few that were taken.

    A model runs the same operations at every size, and the bytes alive after each are a polynomial of the size, of degree two at most
    (attention masks; everything else grows linearly). Three traces give the polynomial of every operation. A fourth is compared with what
    they predict, and where it differs by a byte, each size is traced by itself.

    Args:
        measure: size -> trace.
        unit: the traces are taken at 1, 2, 3 and 5 units.
    """

    def __init__(self, measure: Callable[[int], Trace], unit: int) -> None:
        self._measure, self._unit = measure, unit
        self._known: dict[int, Trace] = {}
        first, second, third = (_stack(self._at(unit * times)) for times in (1, 2, 3))
        self.exact = False
        if first.shape == second.shape == third.shape:
            self._terms = (first, second - first, third - 2 * second + first)
            check = self._at(unit * 5)
            self.exact = all(np.array_equal(a, b) for a, b in zip(_stack(check), self._predict(unit * 5), strict=True))

    def at(self, size: int) -> Trace:
        """The trace at a size."""
        return Trace(*self._predict(size)) if self.exact else self._at(size)

    def longest(self, fits: Callable[[Trace], bool]) -> int:
        """The largest size that fits, by bisection, for a cost that grows with the size; 0 when not even 1 does."""
        if not fits(self.at(1)):
            return 0
        low, high = 1, 2
        while high < LIMIT and fits(self.at(high)):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(self.at(middle)) else (low, middle)
        return low

    def _at(self, size: int) -> Trace:
        if size not in self._known:
            self._known[size] = self._measure(size)
        return self._known[size]

    def _predict(self, size: int) -> np.ndarray:
        """Newton's form on 1, 2 and 3 units, in integers: (4, events)."""
        a, b, c = self._terms
        steps, unit = size - self._unit, self._unit
        return a + (2 * unit * steps * b + steps * (steps - unit) * c) // (2 * unit * unit)


def _stack(trace: Trace) -> np.ndarray:
    return np.stack([trace.live, trace.saved, trace.grads, trace.stepping])

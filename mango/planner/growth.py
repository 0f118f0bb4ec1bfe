"""How a trace grows with the length or the number of inputs: three runs, one to check, then arithmetic where that holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mango.planner.trace import Trace

LIMIT = 1 << 30  # beyond every card here
TRACED = 1 << 19  # no larger size is looked for where each is traced by itself, which takes seconds from there on
FAR = 33  # units of the trace that is compared: beyond the thousand tokens from which our own models work in chunks


class Growth:
    """Traces at any size, from a few that were taken.

    Most models run the same operations at every size, and the bytes alive after each are a polynomial of the size, of degree two at most
    (attention masks; everything else grows linearly). Three traces give the polynomial of every operation. A fourth, of a large size, is
    compared with what they predict, and where it differs by a byte (a model that pads, or works in chunks), each size is traced by itself.

    Args:
        measure: size -> trace.
        unit: the traces are taken at 1, 2, 3 and FAR units.
    """

    def __init__(self, measure: Callable[[int], Trace], unit: int) -> None:
        self._measure, self._unit = measure, unit
        self._known: dict[int, Trace] = {}
        first, second, third = (_stack(self._at(unit * times)) for times in (1, 2, 3))
        self.exact = False
        if first.shape == second.shape == third.shape:
            self._terms = (first, second - first, third - 2 * second + first)
            check = _stack(self._at(unit * FAR))
            self.exact = check.shape == first.shape and np.array_equal(check, self._predict(unit * FAR))

    def at(self, size: int) -> Trace:
        """The trace at a size."""
        return Trace(*self._predict(size)) if self.exact else self._at(size)

    def longest(self, cost: Callable[[Trace], int], limit: int) -> int:
        """The largest size whose cost is at most ``limit``, for a cost that grows with the size; 0 when not even 1 fits. Where each size
        is traced by itself it is a size that fits, at most a thousandth below the largest, and not above TRACED.

        Costs are nearly linear, so the next size to try is where a line meets the limit; every third one halves what is left.
        """
        low: dict[int, int] = {0: 0}  # size -> cost, at most the limit
        high: dict[int, int] = {}  # above it
        most, tried = LIMIT if self.exact else TRACED, 0
        for size in sorted({1, *self._known}):  # those are not traced again
            found = cost(self.at(size))
            (low if found <= limit else high)[size] = found
        while True:
            below, above = max(low), min(high, default=min(8 * max(low), most))
            if below == 0 or below >= most or above - below <= (1 if self.exact else max(1, below // 1000)):
                return below
            size, tried = above, tried + 1
            if high:
                line = below + (limit - low[below]) * (above - below) // (high[above] - low[below])
                size = (below + above) // 2 if tried % 3 == 0 else min(max(line, below + 1), above - 1)
            found = cost(self.at(size))
            (low if found <= limit else high)[size] = found

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

"""The multiple-choice knapsack, solved exactly: one option of each class, the largest total value within a capacity.

Dynamic programming over the undominated (weight, value) sums, class after class, with the pruning of branch and bound: a partial sum is
dropped when not even the linear relaxation of the classes that are left lifts it to the best whole solution known (Dyer et al. 1984;
Pisinger, doi:10.1016/0377-2217(95)00015-I). Departures: classes with heavy options come first, so that what is left open soon costs little
beside them, and equal classes (layers of one shape) share one entry of the relaxation. Values are compared as exact rationals.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

Option = tuple[int, float]  # weight, value
LIMIT = 2048  # partial sums that are followed; hundreds are met with scores that are not made of the weights themselves


class _Kind(NamedTuple):
    """Equal classes."""

    members: list[int]  # their places in the input
    options: list[tuple[int, int]]  # undominated (weight, value), both strictly increasing, above those of the lightest
    indices: list[int]  # places of these options in the input


class _State(NamedTuple):
    weight: int
    value: int
    option: int  # of the class that was added last
    before: _State | None


def solve(classes: Sequence[Sequence[Option]], capacity: int) -> list[int] | None:
    """The index of the option to take from each class; None when the lightest ones together exceed the capacity.

    Among choices of equal value the lightest is returned; among equal options the first; among equal classes the earlier ones get
    the heavier options. Weights are integers >= 0, values any finite numbers.

    Values in proportion to weights (a subset sum) leave nothing to prune. Above LIMIT partial sums only those are followed that may add
    more than a part in 10^9 to the value above the lightest choice, or in 10^8 and so on: the answer is then optimal to within that part.
    """
    kinds, light = _kinds(classes)
    room = capacity - light
    if room < 0:
        return None
    states = [_State(0, 0, 0, None)]
    best = 0
    for number, kind in enumerate(kinds):
        for copy in range(len(kind.members)):
            relaxed = _Relaxation(kind, len(kind.members) - copy - 1, kinds[number + 1 :])
            states, best = _extend(states, kind.options, room, relaxed, best)
    return _unwind(states[-1], kinds, len(classes))


def _kinds(classes: Sequence[Sequence[Option]]) -> tuple[list[_Kind], int]:
    """The classes by kind, those with the heaviest options first, and the weight of the lightest options together."""
    # floats are dyadic rationals: times their largest denominator they are integers, and sums and comparisons are exact
    scale = max((Fraction(value).denominator for options in classes for _, value in options), default=1)
    kinds: dict[tuple[tuple[int, int], ...], _Kind] = {}
    light = 0
    for place, options in enumerate(classes):
        exact = [(weight, int(Fraction(value) * scale), index) for index, (weight, value) in enumerate(options)]
        exact.sort(key=lambda option: (option[0], -option[1], option[2]))
        useful = exact[:1]
        for option in exact[1:]:
            if option[1] > useful[-1][1]:
                useful.append(option)
        weight0, value0, _ = useful[0]
        light += weight0
        above = [(weight - weight0, value - value0) for weight, value, _ in useful]
        kind = kinds.setdefault((*above, *((index, index) for _, _, index in useful)), _Kind([], above, [index for _, _, index in useful]))
        kind.members.append(place)
    return sorted(kinds.values(), key=lambda kind: -kind.options[-1][0]), light


class _Relaxation:
    """How much the classes that are left can add at most to a partial sum: the fractional optimum, and whole choices below it."""

    def __init__(self, kind: _Kind, copies: int, later: Sequence[_Kind]) -> None:
        steps = [(weight, value, copies) for weight, value in _hull(kind.options)] if copies else []
        steps += [(weight, value, len(other.members)) for other in later for weight, value in _hull(other.options)]
        steps.sort(key=lambda step: Fraction(step[1], step[0]), reverse=True)  # stable, so ties keep their order
        self.steps = steps
        self.weights, self.values = [0], [0]
        for weight, value, count in steps:
            self.weights.append(self.weights[-1] + weight * count)
            self.values.append(self.values[-1] + value * count)

    def bounds(self, room: int) -> tuple[int, int]:
        """What whole greedy steps add within ``room``, and what no choice exceeds."""
        place = bisect_right(self.weights, room) - 1
        if place == len(self.steps):
            return self.values[-1], self.values[-1]
        weight, value, _ = self.steps[place]
        left = room - self.weights[place]
        return self.values[place] + left // weight * value, self.values[place] + left * value // weight


def _hull(options: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Steps (weight, value) along the upper concave hull of the options, steepest first."""
    hull = [options[0]]
    for weight, value in options[1:]:
        while len(hull) > 1:
            (w0, v0), (w1, v1) = hull[-2:]
            if (v1 - v0) * (weight - w1) > (value - v1) * (w1 - w0):
                break
            hull.pop()
        hull.append((weight, value))
    return [(w1 - w0, v1 - v0) for (w0, v0), (w1, v1) in pairwise(hull)]


def _extend(
    states: Sequence[_State], options: Sequence[tuple[int, int]], room: int, relaxed: _Relaxation, best: int
) -> tuple[list[_State], int]:
    """The undominated sums with one more class, by increasing weight and value, and the best whole solution known."""
    grown = [
        _State(state.weight + weight, state.value + value, index, state)
        for state in states
        for index, (weight, value) in enumerate(options)
        if state.weight + weight <= room
    ]
    grown.sort(key=lambda state: (state.weight, -state.value))
    undominated: list[_State] = []
    lowers, uppers = [], []
    for state in grown:
        if not undominated or state.value > undominated[-1].value:
            whole, upper = relaxed.bounds(room - state.weight)
            undominated.append(state)
            lowers.append(state.value + whole)
            uppers.append(state.value + upper)
    best = max(best, *lowers)
    kept = [place for place, upper in enumerate(uppers) if upper >= best]
    parts = 10**9
    while len(kept) > LIMIT and parts:
        # the state whose greedy completion is the best solution known stays: one of its extensions has that completion again
        known = lowers.index(best)
        kept = [place for place in kept if uppers[place] > best + best // parts or place == known]
        parts //= 10
    return [undominated[place] for place in kept], best


def _unwind(state: _State, kinds: Sequence[_Kind], count: int) -> list[int]:
    chosen = [0] * count
    for kind in reversed(kinds):
        taken = []
        for _ in kind.members:
            taken.append(state.option)
            assert state.before is not None
            state = state.before
        for place, option in zip(kind.members, sorted(taken, reverse=True), strict=True):
            chosen[place] = kind.indices[option]
    return chosen

"""What a theorem's file provides: see ``theory/t1_codebook.py`` for the pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step of a proof, with the verdict of the machine that checked it.

    ``theory/algebra.py`` has the checkers (identity, certificate of non-negativity, exact enumeration); a verdict is always computed.
    """

    claim: str  # LaTeX, printed in the appendix
    holds: bool


@dataclass(frozen=True)
class Case:
    """One measured quantity beside its bound: what is claimed is measured <= bound.

    ``rounding`` is the relative allowance for the floating point arithmetic *of the measurement*, stated because a tight bound is
    reached: 1e-6 for float32 operators, 1e-12 for float64. ``within``, when given, is how near to its bound the measurement must come,
    relative to the bound: for searches that are claimed to find the worst case.
    """

    name: str
    bound: float
    measured: float
    rounding: float = 0.0
    within: float | None = None

    @property
    def holds(self) -> bool:
        below = self.measured <= self.bound + self.rounding * abs(self.bound)  # NaN does not hold
        return below and (self.within is None or self.slack <= self.within)

    @property
    def violated(self) -> bool:
        return self.measured > self.bound + self.rounding * abs(self.bound)  # NaN does not count as a violation

    @property
    def slack(self) -> float:
        """How far below its bound the measurement stays, relative to the bound (absolute when the bound is zero)."""
        return 1.0 - self.measured / self.bound if self.bound else -self.measured


@dataclass(frozen=True)
class Check:
    """The outcome of measuring mango's own operators against a theorem.

    ``cases`` must all hold. ``control`` drops one assumption and must violate the bound, which shows that the assumption is not idle and
    that the measurement can fail. ``data`` holds what the notebooks draw (plain numbers, strings, lists and dictionaries).
    """

    cases: tuple[Case, ...]
    control: Case
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> Case:
        """A case that fails, else the first that reaches its bound but for rounding, else the nearest to it; counts (bound 0) come last."""

        def distance(case: Case) -> float:
            if not case.holds:
                return -inf
            return max(0.0, case.slack - case.rounding) if case.bound else inf

        return min(self.cases, key=distance)


@dataclass(frozen=True)
class Theorem:
    """A statement with its proof steps and its measurement.

    Attributes:
        id: "T1" ... as in the paper.
        title: a few words.
        statement: LaTeX, exactly what the paper prints.
        source: citation key in paper/refs.bib with the theorem's number there, or "derived here".
        tight: True when the bound is attained (the worst case comes within ``distance`` of it), False when it is only valid.
        modules: the modules of mango that the check measures, for the workflow's re-run rule.
        proof: returns the steps, each checked by sympy or by exact rational enumeration.
        check: measures; ``check(seed)`` is deterministic.
        distance: how near to its bound the worst case of a tight theorem must come, relative to the bound.
    """

    id: str
    title: str
    statement: str
    source: str
    tight: bool
    modules: tuple[str, ...]
    proof: Callable[[], list[Step]]
    check: Callable[[int], Check]
    distance: float = 1e-3

    def failures(self, steps: list[Step], check: Check) -> list[str]:
        """Why the theorem does not stand, one line each; empty when it does."""
        lines = [f"proof step {number}: {step.claim}" for number, step in enumerate(steps, 1) if step.holds is not True]
        lines += [f"{case.name}: measured {case.measured:.9g}, bound {case.bound:.9g}" for case in check.cases if not case.holds]
        if self.tight and not check.worst.slack <= self.distance:
            lines.append(f"said to be tight, but the worst case stays {check.worst.slack:.2%} below its bound")
        if not check.control.violated:
            lines.append(f"control {check.control.name}: {check.control.measured:.9g} does not violate {check.control.bound:.9g}")
        return lines

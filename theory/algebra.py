"""Checkers for proof steps: each computes its verdict from the mathematics it is given, and returns False when that is wrong.

Dimension-free matrix identities are checked in the free algebra: matrices are non-commutative symbols (``letters``), their transposes
further symbols, and relations such as VᵀV = I are rewriting rules (``words``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mango.errors import MissingExtra
from theory.base import Step

try:
    import sympy as sp
except ImportError as error:
    raise MissingExtra.of("sympy", "theory", "checking the proofs") from error


def vanishes(expression: Any) -> bool:
    """Whether a scalar or matrix expression is identically zero."""
    if isinstance(expression, sp.MatrixBase):
        return all(vanishes(entry) for entry in expression)
    expanded = sp.expand(expression)
    if expanded == 0 or not expanded.is_commutative:
        return bool(expanded == 0)
    if expanded.is_rational_function(*expanded.free_symbols):
        return bool(sp.cancel(sp.together(expanded)) == 0)  # a decision; simplify, below, is a search
    return bool(sp.simplify(expanded) == 0)


def identity(claim: str, left: Any, right: Any) -> Step:
    """left = right, for every value of their symbols."""
    return Step(claim, vanishes(left - right))


def nonnegative(claim: str, expression: Any, certificate: Sequence[Any], *, strict: bool = False) -> Step:
    """expression >= 0 (> 0 if strict), because it is the sum of the certificate's terms, each of which is visibly non-negative.

    Visibly: a product of squares of reals and of symbols or constants that are non-negative by assumption (one is positive if strict).
    """
    terms = [sp.sympify(term) for term in certificate]
    signs = all(term.is_nonnegative is True for term in terms) and (not strict or any(term.is_positive is True for term in terms))
    return Step(claim, signs and vanishes(expression - sum(terms)))


def everywhere(claim: str, predicate: Callable[[Any], Any], cases: Iterable[Any]) -> Step:
    """The predicate is true in each of finitely many (exact) cases, of which there is at least one."""
    verdicts = [bool(predicate(case)) for case in cases]
    return Step(claim, bool(verdicts) and all(verdicts))


def letters(names: str) -> Any:
    """Non-commutative symbols, for matrices of any compatible shape."""
    return sp.symbols(names, commutative=False)


def words(expression: Any, rules: Mapping[Any, Any]) -> Any:
    """Expand in the free algebra and rewrite with ``rules`` until nothing changes."""
    current = sp.expand(expression)
    while True:
        rewritten = sp.expand(current.subs(rules))
        if rewritten == current:
            return current
        current = rewritten


def transpose(expression: Any, pairs: Mapping[Any, Any]) -> Any:
    """Transpose in the free algebra; ``pairs`` maps each letter to the letter of its transpose (both directions are filled in)."""
    partner = {**pairs, **{right: left for left, right in pairs.items()}}

    def flip(term: Any) -> Any:
        scalars, factors = sp.expand(term).args_cnc()
        return sp.Mul(*scalars) * sp.Mul(*[sp.Pow(partner[f.base], f.exp) if f.is_Pow else partner[f] for f in reversed(factors)])

    return sp.Add(*[flip(term) for term in sp.Add.make_args(sp.expand(expression))])

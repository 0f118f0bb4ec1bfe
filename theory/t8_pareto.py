r"""T8: which alternatives a scalarisation can find.

Problem: choose among alternatives y in R^k, every objective (loss, bytes, seconds, joules) to be minimised.
Algorithm: ``mango.policy.scalarize``: a weighted sum, or the (augmented) Chebyshev distance from a reference point z below the ideal.
Guarantee (Miettinen 1999, theorems 3.1.1-3.1.3, 3.4.2, 3.4.6): positive weights give Pareto-optimal minimisers; on a non-convex front some
Pareto-optimal point is never found by a weighted sum, and each is found by Chebyshev. Tight: on {(0,1), (1,0), (3/5,3/5)} the best
weighted sum reaches exactly 5/6 of the value of the point it misses.

>>> from theory.t8_pareto import check
>>> outcome = check(0)
>>> print(f"{outcome.worst.measured:.6f} <= {outcome.worst.bound:.6f}", outcome.control.violated)
0.833333 <= 0.833333 True
"""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product

import sympy as sp
import torch
from torch import Tensor

from mango.policy import scalarize
from theory.algebra import everywhere, identity, nonnegative
from theory.base import Case, Check, Step, Theorem

STATEMENT = r"""
Let $Y\subset\mathbb{R}^k$ be a set of alternatives, every objective to be minimised; $y$ \emph{dominates} $x$ if $y\le x$ componentwise and
$y\ne x$; $y\in Y$ is Pareto-optimal if nothing in $Y$ dominates it, weakly so if nothing in $Y$ is smaller in every component.
\begin{enumerate}
\item If $w_i>0$ for all $i$, every minimiser of $\sum_i w_i y_i$ over $Y$ is Pareto-optimal; if $w_i\ge 0$ and $w\ne 0$, it is weakly so.
\item The converse fails: in $\{(0,1),(1,0),(\tfrac35,\tfrac35)\}$ all three are Pareto-optimal, and for all weights $w\ge 0$, $w\ne 0$,
      $\min_{y}\langle w,y\rangle\le\tfrac56\,\langle w,(\tfrac35,\tfrac35)\rangle$, with equality at $w_1=w_2$.
\item Let $z_i<\inf_{y\in Y} y_i$ for all $i$. Every Pareto-optimal $y^\star$ minimises $\max_i w_i(y_i-z_i)$ for $w_i=1/(y^\star_i-z_i)$.
\item For $w_i>0$ and $\rho>0$ every minimiser of $\max_i w_i(y_i-z_i)+\rho\sum_i w_i(y_i-z_i)$ is Pareto-optimal. If $Y$ is finite and no
      $y\in Y$ other than $y^\star$ has $\max_i w_i(y_i-z_i)<1+\varepsilon$ for the weights of (3), then $y^\star$ is its only minimiser
      whenever $\rho k\le\varepsilon$, $\varepsilon>0$.
\end{enumerate}
"""


def proof() -> list[Step]:
    w1, w2, d1, d2, s, eps = sp.symbols("w1 w2 d1 d2 s epsilon", positive=True)
    v1, v2, e2 = sp.symbols("v1 v2 e2", nonnegative=True)
    y1, y2, z1 = sp.symbols("y1 y2 z1", real=True)
    x1 = sp.Symbol("x1", real=True)
    regrets = (sp.Rational(3, 5) * (v1 + v2) - v1, sp.Rational(3, 5) * (v1 + v2) - v2)
    return [
        nonnegative(
            r"(1) If $y$ dominates $x=y+d$, $d\ge0$, $d_1>0$, then $\sum_i w_i x_i-\sum_i w_i y_i=\sum_i w_i d_i>0$: $x$ is no minimiser.",
            (w1 * (y1 + d1) + w2 * (y2 + e2)) - (w1 * y1 + w2 * y2),
            [w1 * d1, w2 * e2],
            strict=True,
        ),
        nonnegative(
            r"(1, weak) If $w\ge0$ with $w_1>0$ and $d_i>0$ for all $i$, the same difference is at least $w_1d_1>0$.",
            (w1 * (y1 + d1) + v2 * (y2 + d2)) - (w1 * y1 + v2 * y2),
            [w1 * d1, v2 * d2],
            strict=True,
        ),
        everywhere(
            r"(2) None of $(0,1)$, $(1,0)$, $(\frac35,\frac35)$ dominates another.",
            lambda pair: not all(a <= b for a, b in zip(*pair, strict=True)),
            [(a, b) for a, b in product(_CONCAVE, repeat=2) if a != b],
        ),
        identity(
            r"(2) The regrets of $(\frac35,\frac35)$ against $(1,0)$ and $(0,1)$ have the mean $\frac1{10}(w_1+w_2)$, so the larger is "
            r"at least "
            r"$\frac16$ of $\langle w,(\frac35,\frac35)\rangle=\frac35(w_1+w_2)$.",
            (regrets[0] + regrets[1]) / 2,
            sp.Rational(1, 6) * sp.Rational(3, 5) * (v1 + v2),
        ),
        identity(r"(2) At $w_1=w_2$ the two regrets are equal, so $\frac56$ is attained.", (regrets[0] - regrets[1]).subs(v2, v1), 0 * v1),
        identity(
            r"(3) With $w_i=1/(y^\star_i-z_i)$: $w_i(x_i-z_i)-1=(x_i-y^\star_i)/(y^\star_i-z_i)$. All terms are $1$ at $y^\star$, and a "
            r"maximum below "
            r"$1$ at $x$ would mean $x_i<y^\star_i$ for all $i$, which Pareto-optimality excludes.",
            (x1 - z1) / (y1 - z1) - 1,
            (x1 - y1) / (y1 - z1),
        ),
        nonnegative(
            r"(4) Let $y$ dominate $x=y+d$ and let $i$ attain the maximum at $y$: the maximum at $x$ is at least $w_i(y_i+d_i-z_i)$, so "
            r"it does "
            r"not fall, and the augmentation grows by $\rho\sum_i w_id_i>0$: $x$ is no minimiser.",
            (w1 * (y1 + e2 - z1) - w1 * (y1 - z1)) + s * (w1 * e2 + w2 * d2),
            [w1 * e2, s * w1 * e2, s * w2 * d2],
            strict=True,
        ),
        nonnegative(
            r"(4) $y^\star$ has the value $1+\rho k\le1+\varepsilon$; any other $y$ has at least $1+\varepsilon+\rho\sum_iw_i(y_i-z_i)$, "
            r"which is larger.",
            (1 + eps + s * (w1 * d1 + w2 * d2)) - (1 + eps - e2),
            [s * w1 * d1, s * w2 * d2, e2],
            strict=True,
        ),
        everywhere(
            r"Exact enumeration: for each of the 84 sets of three points of $\{0,1,2\}^2$, each Pareto-optimal point minimises (3), and "
            r"the "
            r"minimisers of (1) and (4) for $w\in\{1,2,3\}^2$, $\rho=\frac1{10}$ are Pareto-optimal.",
            _holds_exactly,
            list(combinations(product((0, 1, 2), repeat=2), 3)),
        ),
    ]


_CONCAVE = ((Fraction(0), Fraction(1)), (Fraction(1), Fraction(0)), (Fraction(3, 5), Fraction(3, 5)))


def _holds_exactly(points: tuple[tuple[int, int], ...]) -> bool:
    """All four statements on one finite set, in rational arithmetic and without mango."""
    best = [y for y in points if not any(x != y and all(a <= b for a, b in zip(x, y, strict=True)) for x in points)]

    def distance(y: tuple[int, int], w: tuple[Fraction, ...], rho: Fraction) -> Fraction:
        terms = [wi * (yi + 1) for wi, yi in zip(w, y, strict=True)]  # z = (-1, -1)
        return max(terms) + rho * sum(terms)

    def minimisers(values: list[Fraction]) -> list[tuple[int, int]]:
        return [y for y, value in zip(points, values, strict=True) if value == min(values)]

    found = all(y in minimisers([distance(x, tuple(Fraction(1, yi + 1) for yi in y), Fraction(0)) for x in points]) for y in best)
    for w in product((Fraction(1), Fraction(2), Fraction(3)), repeat=2):
        sums = [sum((wi * yi for wi, yi in zip(w, y, strict=True)), Fraction(0)) for y in points]
        distances = [distance(y, w, Fraction(1, 10)) for y in points]
        found = found and all(y in best for y in minimisers(sums) + minimisers(distances))
    return found


def check(seed: int) -> Check:
    """Full enumeration of mango's scalarisations over random sets; coordinates and weights are small integers: float64 is exact."""
    generator = torch.Generator().manual_seed(seed)
    dominated = {"weighted sum": 0, "augmented Chebyshev": 0}
    missed, unsupported, front_size, degenerate = 0, 0, 0, 0
    for objectives in (2, 3, 4):
        for _ in range(100):
            points = torch.randint(0, 10, (16, objectives), generator=generator).double()  # (n, k)
            optimal = scalarize.pareto_front(points)
            reference = points.amin(0) - 1.0
            front_size += int(optimal.sum())
            weights = torch.randint(1, 8, (32, objectives), generator=generator).double()
            sums = torch.stack([scalarize.weighted_sum(points, w) for w in weights])  # (weights, n)
            distances = torch.stack([scalarize.chebyshev(points, w, reference, rho=2.0**-10) for w in weights])
            dominated["weighted sum"] += _not_optimal(sums, optimal)
            dominated["augmented Chebyshev"] += _not_optimal(distances, optimal)
            for target in points[optimal]:
                values = scalarize.chebyshev(points, scalarize.chebyshev_weights(target, reference), reference)
                missed += int(values.min() < 1.0 - 1e-12)  # the target's own value is 1
            supported = (sums == sums.amin(1, keepdim=True)).any(0)
            unsupported += int((optimal & ~supported).sum())
            one_weight = scalarize.weighted_sum(points, [1.0] + [0.0] * (objectives - 1))
            degenerate += _not_optimal(one_weight[None], optimal)
    concave = torch.tensor([[float(a) for a in y] for y in _CONCAVE], dtype=torch.float64)
    share = []
    for angle in torch.linspace(0.0, 1.0, 1001, dtype=torch.float64):
        values = scalarize.weighted_sum(concave, torch.stack([angle, 1.0 - angle]))
        share.append(float(values.min() / values[2]))
    cases = (
        Case("best weighted sum over the value of the Pareto point it misses", 5 / 6, max(share), rounding=1e-12),
        Case("dominated minimisers of positive weighted sums", 0.0, float(dominated["weighted sum"])),
        Case("dominated minimisers of augmented Chebyshev", 0.0, float(dominated["augmented Chebyshev"])),
        Case("Pareto points that Chebyshev misses", 0.0, float(missed)),
    )
    control = Case("dominated minimisers with a zero weight", 0.0, float(degenerate))
    return Check(cases, control, {"pareto_points": front_size, "not_found_by_32_weighted_sums": unsupported, "share": share[::50]})


def _not_optimal(values: Tensor, optimal: Tensor) -> int:
    """How many minimisers (columns) of each scalarisation (row) are not Pareto-optimal; ties are all counted."""
    return int(((values == values.amin(1, keepdim=True)) & ~optimal).sum())


THEOREM = Theorem(
    id="T8",
    title="Pareto points and scalarisations",
    statement=STATEMENT,
    source="miettinen1999nonlinear, Theorems 3.1.1-3.1.3, 3.4.2-3.4.6; the constant 5/6 derived here",
    tight=True,
    modules=("mango.policy.scalarize",),
    proof=proof,
    check=check,
    distance=1e-9,
)

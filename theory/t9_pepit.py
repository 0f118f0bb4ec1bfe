r"""T9: the worst case of EF21 with one worker, certified by semidefinite programming (performance estimation, PEP).

Problem: minimise an L-smooth f that is bounded below by f*; the gradient is sent through an alpha-contractive compressor C.
Algorithm: EF21 (``mango.feedback.EF21``), x+ = x - gamma g, g+ = g + C(grad f(x+) - g), gamma = (1 - q)/L, q = sqrt(1 - alpha), any g_0.
Guarantee: EF21's bound (richtarik2021ef21, theorem 1, with theta = 1 - q) on the mean squared gradient norm of T iterates. PEPit
(goujaud2024pepit) finds the worst function *and* the worst compressor: each output of C is a free point under the contraction constraint.
Valid, not tight: the table is worst case / bound. For alpha = 3/4 the certificate is checked again in exact rational arithmetic.

>>> from theory.t9_pepit import wc_ef21
>>> print(f"{wc_ef21(0.5, 1):.3f} {wc_ef21(0.5, 2):.3f} {wc_ef21(0.5, 3):.3f}")
0.293 0.448 0.536
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from mango import compressors
from mango.errors import MissingExtra
from mango.feedback import EF21
from theory.algebra import everywhere, identity, nonnegative
from theory.base import Case, Check, Step, Theorem

STATEMENT = r"""
Let $f$ be $L$-smooth and bounded below by $f^\star$, $C$ $\alpha$-contractive and deterministic, $0<\alpha<1$, $q=\sqrt{1-\alpha}$,
$\gamma=(1-q)/L$, and $x_{t+1}=x_t-\gamma g_t$, $g_{t+1}=g_t+C(\nabla f(x_{t+1})-g_t)$ from any $x_0,g_0$. Let $\rho_T(\alpha)$ be the
largest ratio of
$\frac1T\sum_{t<T}\|\nabla f(x_t)\|^2$ to EF21's bound $\frac{2(f(x_0)-f^\star)}{\gamma T}+\frac{\|g_0-\nabla f(x_0)\|^2}{(1-q)T}$, over
all such $f$
and $C$ in every dimension. It is at most the value of the semidefinite programme whose variables are the Gram matrix of all points, the
function values, and one free point for each output of $C$, subject to smooth interpolation, to contraction, and to
$f^\star\le f(x_t)-\frac1{2L}\|\nabla f(x_t)\|^2$. That value is below $1$ for $\alpha\in\{\frac14,\frac12,\frac34,\frac9{10}\}$ and
$T\le3$,
and $\rho_1(\alpha)=1-\sqrt{1-\alpha}$ exactly.
"""

# worst case / bound as printed in the paper, three digits
TABLE = {
    0.25: (0.134, 0.235, 0.314),
    0.5: (0.293, 0.448, 0.536),
    0.75: (0.500, 0.655, 0.713),
    0.9: (0.684, 0.798, 0.825),
}
SOLVER = 1e-5  # relative accuracy asked of the interior-point solver's values


def require_solver() -> None:
    """Raises: MissingExtra without PEPit, cvxpy or Clarabel."""
    try:
        import clarabel  # noqa: F401
        import cvxpy  # noqa: F401
        import PEPit  # noqa: F401
    except ImportError as error:
        raise MissingExtra.of(error.name or "PEPit", "theory", "certifying worst cases") from error


@cache
def wc_ef21(alpha: float, steps: int, stretch: float = 1.0, lower_bound: bool = True) -> float:
    """Worst case over bound by PEPit, L = 1, gamma = stretch (1 - q); infinite when the programme is unbounded.

    ``lower_bound`` = False leaves out f* <= f_i - ||g_i||^2 / 2L and keeps f* <= f_i only.
    Raises: MissingExtra without the solver.
    """
    require_solver()
    from PEPit import PEP, Expression, Point
    from PEPit.functions import SmoothFunction

    q = sqrt(1.0 - alpha)
    gamma = stretch * (1.0 - q)
    problem = PEP()
    f = problem.declare_function(SmoothFunction, L=1.0)
    x, g, least = problem.set_initial_point(), Point(), Expression()
    bound, total = 0.0, 0.0
    for t in range(steps):
        gradient, value = f.oracle(x)
        if t == 0:
            bound = 2.0 * (value - least) / (gamma * steps) + (g - gradient) ** 2 / ((1.0 - q) * steps)
        else:
            sent = Point()
            problem.add_constraint((sent - (gradient - g)) ** 2 <= (1.0 - alpha) * (gradient - g) ** 2)
            g = g + sent
        problem.add_constraint(least <= value - (0.5 * gradient**2 if lower_bound else 0.0))
        total = total + gradient**2
        x = x - gamma * g
    problem.set_initial_condition(bound <= 1.0)
    problem.set_performance_metric(total / steps)
    worst = problem.solve(verbose=0, solver="CLARABEL")
    return float("inf") if worst is None else float(worst)


def proof() -> list[Step]:
    require_solver()
    big_l, q = sp.symbols("L q", positive=True)
    f, d, x0 = sp.symbols("f d x0", real=True)
    xi, xj, di, dj = sp.symbols("x_i x_j d_i d_j", real=True)
    slack, start = sp.symbols("s e", nonnegative=True)
    gamma = (1 - q) / big_l
    middle = (xi + xj) / 2 + (dj - di) / (2 * big_l)
    two_sided = dj * (middle - xj) - di * (middle - xi) - big_l / 2 * ((middle - xj) ** 2 + (middle - xi) ** 2)
    return [
        identity(
            r"$f^\star\le f(x-\frac1L\nabla f(x))\le f(x)-\frac1{2L}\|\nabla f(x)\|^2$: the descent lemma at that point, coordinate by "
            r"coordinate.",
            f + d * (-d / big_l) + big_l / 2 * (d / big_l) ** 2,
            f - d**2 / (2 * big_l),
        ),
        identity(
            r"Smooth interpolation is necessary: the lower parabola at $x_j$ is below the upper one at $x_i$ for every $y$, at "
            r"$y=\frac{x_i+x_j}2+\frac{d_j-d_i}{2L}$ too, hence $f_i-f_j\ge\frac12\langle d_i+d_j,x_i-x_j\rangle+\frac1{4L}\|d_i-d_j\|^2"
            r"-\frac L4\|x_i-x_j\|^2$.",
            two_sided,
            (di + dj) * (xi - xj) / 2 + (di - dj) ** 2 / (4 * big_l) - big_l / 4 * (xi - xj) ** 2,
        ),
        nonnegative(
            r"$T=1$: with $f(x_0)-f^\star=\frac1{2L}\|d\|^2+s$ and $e=\|g_0-d\|^2$, $(1-q)$ times the bound minus $\|d\|^2$ is "
            r"$2Ls+e\ge0$.",
            (1 - q) * (2 * (d**2 / (2 * big_l) + slack) / gamma + start / (1 - q)) - d**2,
            [2 * big_l * slack, start],
        ),
        identity(
            r"$T=1$ is attained by $f=\frac L2x^2$, $g_0=\nabla f(x_0)$: the ratio is $1-q$.",
            (big_l * x0) ** 2 / (2 * (big_l * x0**2 / 2) / gamma),
            1 - q,
        ),
        everywhere(
            r"$\alpha=\frac34$, $L=1$: $\rho_1\le0.5001$, $\rho_2\le0.6546$ and $\rho_3\le0.7132$, by weak duality: with rational "
            r"multipliers, $\rho$ times "
            r"the bound minus the mean squared gradient norm equals a non-negative combination of the constraints plus a quadratic form "
            r"whose "
            r"$LDL^\top$ pivots are all positive (exact rational arithmetic; multipliers found numerically, then rounded).",
            lambda target: exact_certificate(*target),
            [(1, Fraction(5001, 10000)), (2, Fraction(6546, 10000)), (3, Fraction(7132, 10000))],
        ),
    ]


def _programme(steps: int) -> tuple[list[sp.Symbol], list[sp.Symbol], sp.Expr, sp.Expr, list[sp.Expr]]:
    """The PEP at alpha = 3/4, L = 1, gamma = 1/2 in one coordinate: a quadratic form is a linear form in the Gram matrix.

    Returns points, function values (f* last), bound, metric, and the constraints (each >= 0): smoothness and contraction first, f* last.
    """
    d = list(sp.symbols(f"d0:{steps}"))
    values = [*sp.symbols(f"f0:{steps}"), sp.Symbol("f_star")]
    g0, sent = sp.Symbol("g0"), list(sp.symbols(f"c1:{max(1, steps - 1)}"))
    gamma, q = sp.Rational(1, 2), sp.Rational(1, 2)
    x, g, constraints = [sp.Integer(0)], g0, []
    for t in range(1, steps):
        x.append(x[-1] - gamma * g)
        if t < steps - 1:
            change = d[t] - g
            constraints.append(q**2 * change**2 - (sent[t - 1] - change) ** 2)
            g = g + sent[t - 1]
    for i in range(steps):
        for j in range(steps):
            if i != j:
                step = x[i] - x[j]
                constraints.append(values[i] - values[j] - (d[i] + d[j]) * step / 2 - (d[i] - d[j]) ** 2 / 4 + step**2 / 4)
    constraints += [values[t] - values[-1] - d[t] ** 2 / 2 for t in range(steps)]
    bound = 2 * (values[0] - values[-1]) / (gamma * steps) + (g0 - d[0]) ** 2 / ((1 - q) * steps)
    return [*d, g0, *sent], values, bound, sum(v**2 for v in d) / steps, constraints


def exact_certificate(steps: int, ratio: Fraction) -> bool:
    """Whether ``ratio`` is a proved upper bound of the worst case: the solver's multipliers, rounded, are judged exactly."""
    points, values, bound, metric, constraints = _programme(steps)
    rho = sp.Rational(ratio.numerator, ratio.denominator)
    goal = rho * bound - metric
    multipliers = _multipliers(points, values, goal, constraints)
    free = len(constraints) - steps  # the last ones, of f* <= ..., are then determined by the function values' coefficients
    exact = [sp.Rational(round(float(value) * 10**7), 10**7) for value in multipliers[:free]]
    rest = sp.expand(goal - sum(m * c for m, c in zip(exact, constraints[:free], strict=True)))
    exact += [rest.coeff(value, 1) for value in values[:steps]]
    remainder = sp.expand(goal - sum(m * c for m, c in zip(exact, constraints, strict=True)))
    form = _matrix(remainder, points)
    no_values = not any(remainder.has(value) for value in values)
    same = sp.expand((sp.Matrix([points]) * form * sp.Matrix(points))[0] - remainder) == 0
    return (
        no_values
        and same
        and all(m >= 0 for m in exact)
        and all(pivot > 0 for pivot in form.LDLdecomposition(hermitian=False)[1].diagonal())
    )


def _matrix(form: sp.Expr, points: list[sp.Symbol]) -> sp.Matrix:
    return sp.hessian(form, points) / 2


def _multipliers(points: list[sp.Symbol], values: list[sp.Symbol], goal: sp.Expr, constraints: list[sp.Expr]) -> Any:
    """Multipliers well inside the feasible set of the dual, by Clarabel."""
    import cvxpy as cp

    def parts(expression: sp.Expr) -> tuple[Any, Any]:
        linear = [float(sp.expand(expression).coeff(value, 1)) for value in values]
        return np.array(linear), np.array(_matrix(expression, points).tolist(), dtype=float)

    goal_linear, goal_form = parts(goal)
    pieces = [parts(constraint) for constraint in constraints]
    m, margin = cp.Variable(len(constraints)), cp.Variable()
    form = goal_form - sum(m[i] * piece[1] for i, piece in enumerate(pieces))
    linear = goal_linear - sum(m[i] * piece[0] for i, piece in enumerate(pieces))
    inside = [linear == 0, m >= margin, form >> margin * np.eye(len(points))]
    cp.Problem(cp.Maximize(margin), [*inside, m <= 100.0]).solve(solver=cp.CLARABEL)
    return m.value


def trajectory_ratio(alpha: float, steps: int, seed: int, trials: int = 48) -> float:
    """Largest ratio of mango's EF21 with top-k, alpha = k / n, on random quadratics f = sum h_i x_i^2 / 2, 0 <= h_i <= 1."""
    n, k = {0.25: (4, 1), 0.5: (2, 1), 0.75: (4, 3), 0.9: (10, 9)}[alpha]
    q, generator, worst = sqrt(1.0 - alpha), torch.Generator().manual_seed(seed), 0.0
    for trial in range(trials):
        curvature = torch.rand(n, generator=generator, dtype=torch.float64)
        x = torch.randn(n, generator=generator, dtype=torch.float64)
        if trial == 0:  # one coordinate at full curvature: top-k sends it exactly, g_0 is the gradient, and T = 1 is attained
            curvature, x = torch.ones_like(curvature), torch.eye(n, dtype=torch.float64)[0]
        worst = max(worst, _ratio(x, curvature, EF21(compressors.TopK(k=k)), steps, q))
    return worst


def _ratio(x: Tensor, curvature: Tensor, feedback: EF21, steps: int, q: float) -> float:
    norms, bound = 0.0, 0.0
    for t in range(steps):
        gradient = curvature * x
        g = feedback.step([gradient])
        assert isinstance(g, Tensor)
        if t == 0:
            bound = float((curvature * x * x).sum() / ((1.0 - q) * steps) + (g - gradient).square().sum() / ((1.0 - q) * steps))
        norms += float(gradient.square().sum()) / steps
        x = x - (1.0 - q) * g
    return norms / bound


def check(seed: int) -> Check:
    cases, worst, distance = [], {}, 0.0
    for alpha, printed in TABLE.items():
        exact = 1.0 - sqrt(1.0 - alpha)
        row = [wc_ef21(alpha, steps) for steps in (1, 2, 3)]
        worst[str(alpha)] = row
        distance = max(distance, *(abs(value - digits) for value, digits in zip(row, printed, strict=True)))
        cases.append(Case(f"alpha={alpha}, T=1: PEP against 1 - sqrt(1 - alpha)", exact, row[0], rounding=SOLVER, within=SOLVER))
        for steps, value in enumerate(row, 1):
            cases.append(Case(f"alpha={alpha}, T={steps}: PEP against EF21's bound", 1.0, value))
            ran = trajectory_ratio(alpha, steps, seed)
            cases.append(Case(f"alpha={alpha}, T={steps}: mango's EF21 with top-k against PEP", value, ran, rounding=SOLVER))
    cases.append(Case("distance of PEP from the printed three digits", 5e-4, distance))
    stretched = wc_ef21(0.5, 3, stretch=3.0)
    loose = {f"T={steps}": wc_ef21(0.5, steps, lower_bound=False) for steps in (1, 2)}
    data = {
        "worst_case_over_bound": worst,
        "three_times_the_step_size": {str(alpha): [wc_ef21(alpha, steps, stretch=3.0) for steps in (1, 2, 3)] for alpha in TABLE},
        "without_the_lower_bound_on_f": {key: value if value < float("inf") else "unbounded" for key, value in loose.items()},
    }
    return Check(tuple(cases), Case("alpha=0.5, T=3: three times the step size", 1.0, stretched), data)


THEOREM = Theorem(
    id="T9",
    title="Worst case of EF21 certified by PEP",
    statement=STATEMENT,
    source="richtarik2021ef21, Theorem 1, for the bound; goujaud2024pepit and taylor2017smooth for the method; values derived here",
    tight=True,
    modules=("mango.feedback.ef21", "mango.compressors.sparse"),
    proof=proof,
    check=check,
    distance=1e-5,
)

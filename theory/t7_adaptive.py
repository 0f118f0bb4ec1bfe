r"""T7: a policy may change the compression while EF21 runs: what holds, and why the average contraction is not enough.

Problem: as T5, with a compressor that a policy chooses anew before every round.
Algorithm: ``mango.feedback.EF21`` with ``use(compressor)`` between rounds.
Guarantee (derived here): T5 with the least contraction for any policy that chooses before the draw; a weaker condition for plans known in
advance, through w_t = 1 + (1 - theta_t) w_{t+1}. Valid, not tight; for a constant plan S = (beta / theta) (1 - (1 - theta)^(T - 1)).

>>> from mango.feedback import rates
>>> plan = rates.schedule([1.0, 0.5] * 100)
>>> print(plan.step(1.0, 1.0) > rates.ef21(0.5).step(1.0, 1.0))
True
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import sqrt
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from mango import compressors
from mango.compressors.base import Compressor
from mango.feedback import EF21, rates
from theory import descent as shared
from theory.algebra import everywhere, identity, nonnegative
from theory.base import Case, Check, Step, Theorem
from theory.problems import breast_cancer

STATEMENT = r"""
In the setting of EF21 (T5), let round $t\to t+1$ use a compressor of contraction $\alpha_t\in(0,1]$, $q_t=\sqrt{1-\alpha_t}$,
$\theta_t=1-q_t$, $\beta_t=\frac{1-\alpha_t}{1-q_t}$.
\begin{enumerate}
\item \emph{Any policy that looks back.} If $\alpha_t$ is chosen from what happened up to $x^{t+1}$, before the compressor's randomness is
      drawn, and $\alpha_t\ge \alpha_{\min}>0$, then both rates of T5 hold with $\alpha=\alpha_{\min}$.
\item \emph{Plans known in advance.} If $\alpha_0,\dots,\alpha_{T-1}$ are fixed, let $w_T=0$, $w_t=1+(1-\theta_t)w_{t+1}$ and
      $S=\max_{t<T}\beta_tw_{t+1}$. If $\gamma\le(L+\tilde L\sqrt S)^{-1}$, then $\displaystyle\frac1T\sum_{t<T}\mathbb E\|\nabla
      f(x^t)\|^2\le\frac{2\Delta}{\gamma T}+\frac{w_0\,\mathbb E\,G_0}T.$ Moreover $w_t\le1/\theta_{\min}$ and
      $S\le\beta_{\max}/\theta_{\min}$: the step is never smaller than that of (1). Since $w_t$ looks forward, a random plan needs
      deterministic lower bounds of its $\alpha_t$.
\item \emph{The average is not enough.} With $n=1$, $f(x)=\frac L2x^2$, $g^0=\nabla f(x^0)$, $\alpha_t=1$ for $t<m$ and $C=0$
      ($\alpha_t=0$) afterwards, $\nabla f(x^{m+j})=(1-j\gamma L)\nabla f(x^m)$ diverges for every $\gamma>0$ with $\gamma L\ne1$ and
      $x^0\neq0$.
\item \emph{The choice must come before the draw.} Unscaled Rand-1 in $\mathbb R^2$ has $\alpha=\frac12$, but the worse of two independent
      draws contracts $u=(1,0)$ by $\frac14$ only.
\end{enumerate}
"""

STEPS = 200
POINTS = 100
DIM, AVERAGED = 4096, 200  # of the control


def proof() -> list[Step]:
    gamma, L = shared.gamma, shared.L
    x1, x2 = shared.slack[:2]
    theta, beta, D2, R, w, Lt, S, G0, SR = sp.symbols("theta_t beta_t G_t R_t w Ltilde S G_0 S_R", positive=True)
    tail = sp.Symbol("tail", nonnegative=True)  # sum over s > t of beta_s w_{s+1} Ltilde^2 |x^{s+1} - x^s|^2
    gap, room = sp.symbols("gap room", nonnegative=True)
    more = sp.Symbol("r", positive=True)
    alpha = sp.Symbol("alpha_min", positive=True)
    after = (1 - theta) * D2 + beta * R - x1  # G_{t+1}; R stands for Ltilde^2 |x^{t+1} - x^t|^2
    Sg = sp.Symbol("S_g", positive=True)
    errors = G0 * w + S * Lt**2 * SR - x1  # sum of G_t
    Delta = gamma / 2 * Sg + (1 / (2 * gamma) - L / 2) * SR - gamma / 2 * errors + x2
    least, q = sp.symbols("theta_min q", positive=True)
    g, power = sp.symbols("g power", real=True)
    j = sp.Symbol("j", nonnegative=True)
    return [
        nonnegative(
            r"(1) Given the past, which fixes $\alpha_t$ and $u=\nabla f_i(x^{t+1})-g_i^t$, $\mathbb "
            r"E\|C_t(u)-u\|^2\le(1-\alpha_t)\|u\|^2\le(1-\alpha_{\min})\|u\|^2$. "
            r"T5 uses nothing else of $C$ (tower rule), so its proof applies with $\alpha_{\min}$.",
            (1 - alpha) * D2 - ((1 - (alpha + gap)) * D2 - x1),
            [gap * D2, x1],
        ),
        nonnegative(
            r"(2) T5's recursion with $\alpha_t$ is $\mathbb E\,G_{t+1}\le(1-\theta_t)G_t+\beta_tR_t$, $R_t=\tilde L^2\|x^{t+1}-x^t\|^2$. "
            r"Backward induction: "
            r"$\sum_{u=t}^{T-1}\mathbb E\,G_u\le w_tG_t+\sum_{s=t}^{T-2}\beta_sw_{s+1}R_s$ follows from the same at $t+1$, for "
            r"$G_t+w_{t+1}G_{t+1}\le w_tG_t+\beta_tw_{t+1}R_t$.",
            (1 + (1 - theta) * w) * D2 + beta * w * R + tail - (D2 + (w * after + tail - x2)),
            [w * x1, x2],
        ),
        identity(r"(2) It starts at $t=T-1$: $G_{T-1}=w_{T-1}G_{T-1}$, as $w_T=0$.", D2, (1 + (1 - theta) * 0) * D2),
        shared.descent(),
        nonnegative(
            r"(2) Sum the descent inequalities with $\sum G_t\le w_0G_0+S\tilde L^2\sum\|x^{t+1}-x^t\|^2$: the coefficient of "
            r"$\sum\|x^{t+1}-x^t\|^2$ is "
            r"$-\frac1{2\gamma}(1-L\gamma-M^2\gamma^2)$ with $M=\tilde L\sqrt S$, hence $\sum\|\nabla "
            r"f(x^t)\|^2\le\frac{2\Delta}\gamma+w_0G_0$.",
            (2 * Delta / gamma + w * G0 - Sg).subs(L, (1 - S * Lt**2 * gamma**2 - room) / gamma),
            [room * SR / gamma**2, x1, 2 * x2 / gamma],
        ),
        shared.step_condition(),
        nonnegative(
            r"(2) $w_t\le1/\theta_{\min}$ by backward induction: $1+(1-\theta_t)\frac1{\theta_{\min}}\le\frac1{\theta_{\min}}$ for "
            r"$\theta_t\ge\theta_{\min}$.",
            1 / least - (1 + (1 - (least + gap)) / least),
            [gap / least],
        ),
        nonnegative(
            r"(2) $\beta=\frac{q^2}{1-q}$ grows with $q$ on $(0,1)$, so $\beta_t\le\beta(\alpha_{\min})$ and $S\le\beta/\theta$ at "
            r"$\alpha_{\min}$ "
            r"($q=\frac1{1+r}$; the derivative is $\frac{2q-q^2}{(1-q)^2}$).",
            sp.diff(q**2 / (1 - q), q).subs(q, 1 / (1 + more)),
            [(2 * more + 1) / more**2],
            strict=True,
        ),
        identity(
            r"(2) For a constant plan $w_t=\frac{1-(1-\theta)^{T-t}}\theta$: it satisfies $w_t=1+(1-\theta)w_{t+1}$ (with a symbol for "
            r"$(1-\theta)^{T-t-1}$).",
            (1 - (1 - least) * power) / least,
            1 + (1 - least) * (1 - power) / least,
        ),
        identity(
            r"(3) From $x^m$ on $g^t=\nabla f(x^m)=g$ is frozen, so $\nabla f(x^{m+j+1})=\nabla f(x^{m+j})-\gamma Lg$: induction on $j$ "
            r"gives $(1-j\gamma L)g$, "
            r"with $g=(1-\gamma L)^mLx^0\ne0$.",
            (1 - j * gamma * L) * g - gamma * L * g,
            (1 - (j + 1) * gamma * L) * g,
        ),
        everywhere(
            r"(4) Of the four equally likely pairs of draws three contain one that drops the first coordinate: the worse keeps it with "
            r"probability "
            r"$\frac14$, and the mean squared error on $(1,0)$ is $\frac34$, not $\frac12$ (enumerated).",
            lambda expected: sp.Rational(sum(max(a, b) for a, b in product((0, 1), repeat=2)), 4) == expected,
            [sp.Rational(3, 4)],
        ),
    ]


def check(seed: int) -> Check:
    task = breast_cancer()
    x0 = torch.zeros(task.dim, dtype=torch.float64)
    excess = task.value(x0) - task.infimum
    counts = {  # k of top-k, by round
        "coarse to fine": [3 + round(27 * t / STEPS) for t in range(STEPS)],
        "fine to coarse": [30 - round(27 * t / STEPS) for t in range(STEPS)],
        "every tenth round exact": [30 if t % 10 == 0 else 3 for t in range(STEPS)],
    }
    cases, curves = [], {}
    for label, ks in counts.items():
        plan = rates.schedule([k / task.dim for k in ks])
        squared, initial = _run(plan.step(task.L, task.L_tilde), lambda t, _, ks=ks: ks[t])  # type: ignore[misc]
        bound = 2 * excess / (plan.step(task.L, task.L_tilde) * STEPS) + plan.w0 * initial / STEPS
        cases.append(Case(f"known plan, {label}: mean |grad f|^2", bound, sum(squared) / STEPS))
        curves[label] = _curve(squared) | {"gamma": plan.step(task.L, task.L_tilde), "bound": bound, "k": ks[:: max(1, STEPS // POINTS)]}
    least = rates.ef21(6 / task.dim)
    gamma = least.step(task.L, task.L_tilde)
    generator = torch.Generator().manual_seed(seed)

    def random(t: int, error: float) -> int:
        return int(torch.randint(6, 31, (), generator=generator))

    def threshold(t: int, error: float) -> int:  # finer when the last round left a large error
        return 24 if error > 0.5 else 6

    for label, policy in (("random", random), ("by the last error", threshold)):
        squared, initial = _run(gamma, policy)
        bound = 2 * excess / (gamma * STEPS) + initial / (least.theta * STEPS)
        cases.append(Case(f"policy that looks back, {label}, alpha_min = 1/5: mean |grad f|^2", bound, sum(squared) / STEPS))
        curves[label] = _curve(squared) | {"gamma": gamma, "bound": bound}
    controls = [_average(), _after_the_draw()]
    data = {"curves": curves, "controls": [{"name": c.name, "bound": c.bound, "measured": c.measured} for c in controls]}
    names = "; ".join(control.name for control in controls)
    return Check(tuple(cases), Case(f"least measured / bound of: {names}", 1.0, min(c.measured / c.bound for c in controls)), data)


def _run(gamma: float, policy: Callable[[int, float], int]) -> tuple[list[float], float]:
    """EF21 with top-k on the logistic task; ``policy(t, relative error of the last round)`` is k of round t. Returns |grad f|^2 and G_0."""
    task = breast_cancer()
    method = EF21(compressors.TopK(k=policy(0, 1.0)))
    x, error, initial = torch.zeros(task.dim, dtype=torch.float64), 1.0, 0.0
    squared = []
    for t in range(STEPS):
        rows = task.gradients(x)
        estimate = method.step(list(rows))
        assert isinstance(estimate, Tensor)
        tracked = torch.stack([method.tracked(worker)[0] for worker in range(task.workers)])
        error = float((tracked - rows).norm() / rows.norm())
        initial = initial if t else float((tracked - rows).square().sum(1).mean())
        squared.append(float(rows.mean(0).square().sum()))
        x = x - gamma * estimate
        method.use(compressors.TopK(k=policy(t, error)))  # of the round t -> t + 1, before its gradients are compressed
    return squared, initial


def _curve(squared: list[float]) -> dict[str, Any]:
    every = max(1, STEPS // POINTS)
    return {"t": list(range(0, STEPS, every)), "gradient": [sqrt(value) for value in squared[::every]]}


def _average() -> Case:
    """Ten exact rounds, then top-1 of 4096 (alpha = 1/4096), with the step and the bound of the average alpha, on f = |x|^2 / 2."""
    plan: list[Compressor] = [compressors.Identity()] * 10 + [compressors.TopK(k=1)] * (AVERAGED - 10)
    x = torch.ones(DIM, dtype=torch.float64)
    mean = sum(compressor.alpha((DIM,), torch.float64) for compressor in plan) / AVERAGED
    gamma = rates.ef21(mean).step(1.0, 1.0)
    bound = float(x.square().sum()) / (gamma * AVERAGED)  # 2 Delta / (gamma T); G_0 = 0
    method, total = EF21(plan[0]), 0.0
    for compressor in plan:
        method.use(compressor)
        total += float(x.square().sum())
        estimate = method.step([x])
        assert isinstance(estimate, Tensor)
        x = x - gamma * estimate
    return Case("averaged alpha (ten exact rounds, then top-1 of 4096): mean |grad f|^2", bound, total / AVERAGED)


def _after_the_draw() -> Case:
    """The worse of two draws of unscaled Rand-1 on (1, 0), over all equally likely pairs of mango's payloads."""
    u = torch.tensor([1.0, 0.0], dtype=torch.float64)
    operator = compressors.RandK(k=1, scaled=False)
    outcomes: dict[tuple[float, ...], float] = {}
    for draw in range(64):
        image = operator(u, generator=torch.Generator().manual_seed(draw))
        outcomes[tuple(image.tolist())] = float((image - u).square().sum())
    errors = list(outcomes.values())
    measured = sum(max(pair) for pair in product(errors, repeat=2)) / len(errors) ** 2
    return Case("rand-1 chosen after the draw: E|C(u) - u|^2 / |u|^2", 1 - operator.alpha((2,), torch.float64), measured)


THEOREM = Theorem(
    id="T7",
    title="Adaptive policies under EF21",
    statement=STATEMENT,
    source="derived here",
    tight=False,
    modules=("mango.feedback.ef21", "mango.feedback.base", "mango.feedback.rates", "mango.compressors"),
    proof=proof,
    check=check,
)

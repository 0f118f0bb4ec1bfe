"""Proof steps that T5, T6 and T7 share: what follows from smoothness alone, whatever estimates the gradient.

Inequalities between norms are checked coordinate by coordinate, so real symbols stand for vectors; "X <= Y" that is *given* enters as
X = Y - slack with a non-negative symbol, so that the conclusion is again a certificate.
"""

from __future__ import annotations

from typing import Any

import sympy as sp

from theory.algebra import identity, nonnegative
from theory.base import Step

gamma, L, theta, mu, p = sp.symbols("gamma L theta mu p", positive=True)
slack = sp.symbols("slack_1:6", nonnegative=True)


def young() -> Step:
    a, b = sp.symbols("a b", real=True)
    s = sp.Symbol("s", positive=True)
    return nonnegative(
        r"Young: for $s>0$, $\|a+b\|^2\le(1+s)\|a\|^2+(1+1/s)\|b\|^2$, the difference being $\|sa-b\|^2/s$.",
        (1 + s) * a**2 + (1 + 1 / s) * b**2 - (a + b) ** 2,
        [(s * a - b) ** 2 / s],
    )


def variance() -> Step:
    n, first, second = sp.symbols("n S_1 S_2", positive=True)
    return identity(
        r"Jensen: $\frac1n\sum_i\|v_i\|^2-\|\bar v\|^2=\frac1n\sum_i\|v_i-\bar v\|^2=\frac{1}{2n^2}\sum_{i,l}\|v_i-v_l\|^2\ge0$, "
        r"$\bar v=\frac1n\sum_iv_i$ (in $S_1=\sum v_i$, $S_2=\sum v_i^2$).",
        second / n - (first / n) ** 2,
        (n * second - 2 * first**2 + n * second) / (2 * n**2),
    )


def descent() -> Step:
    d, g = sp.symbols("d g", real=True)  # coordinates of the gradient at x and of the estimate
    return identity(
        r"Descent: with $x^+=x-\gamma g$, $L$-smoothness $f(x^+)\le f(x)+\langle\nabla f(x),x^+-x\rangle+\frac L2\|x^+-x\|^2$ reads "
        r"$f(x^+)\le f(x)-\frac\gamma2\|\nabla f(x)\|^2-\bigl(\frac1{2\gamma}-\frac L2\bigr)\|x^+-x\|^2+\frac\gamma2\|g-\nabla f(x)\|^2$.",
        -gamma * d * g + L / 2 * (gamma * g) ** 2,
        -gamma / 2 * d**2 - (1 / (2 * gamma) - L / 2) * (gamma * g) ** 2 + gamma / 2 * (g - d) ** 2,
    )


def step_condition() -> Step:
    M = sp.Symbol("M", positive=True)
    r = slack[0]
    step = 1 / (L + M + r)
    return nonnegative(
        r"Step size: for $M\ge0$, $\gamma\le 1/(L+M)$ implies $1-L\gamma-M^2\gamma^2\ge0$ (put $1/\gamma=L+M+r$, $r\ge0$: it equals "
        r"$(r^2+LM+Lr+2Mr)\gamma^2$).",
        1 - L * step - M**2 * step**2,
        [term * step**2 for term in (r**2, L * M, L * r, 2 * M * r)],
    )


def lyapunov(claim: str, weight: Any, contraction: Any, growth: Any) -> Step:
    r"""If E+ <= contraction E + growth R, then Phi = f - f* + weight E loses gamma/2 |grad|^2 + (1 - L gamma - M^2 gamma^2)/(2 gamma) R "
    r"a step.

    ``weight`` must satisfy gamma/2 + weight contraction = weight, and M^2 = 2 weight growth / gamma; both are part of what is checked.
    """
    f, grad, R, E = sp.symbols("f grad R E", nonnegative=True)  # f - f*, |grad f(x)|^2, |x+ - x|^2, error of the estimate
    f_plus = f - gamma / 2 * grad - (1 / (2 * gamma) - L / 2) * R + gamma / 2 * (E - slack[0]) - slack[1]
    E_plus = contraction * E + growth * R - slack[2]
    M2 = 2 * weight * growth / gamma
    kept = (1 - L * gamma - M2 * gamma**2) / (2 * gamma)
    drop = (f + weight * E) - (f_plus + weight * E_plus) - gamma / 2 * grad - kept * R
    return nonnegative(claim, drop, [gamma / 2 * slack[0], slack[1], weight * slack[2]])


def lyapunov_pl(claim: str, rate: Any, growth: Any) -> Step:
    r"""If E+ <= (1 - rate) E + growth R, Psi = f - f* + (gamma/rate) E and gamma <= rate/(2 mu): Psi+ <= (1 - gamma mu) Psi - (...) R."""
    f, R, E = sp.symbols("f R E", nonnegative=True)
    room = slack[3]  # rate/2 - gamma mu
    grad = 2 * mu * f + slack[4]  # the PL inequality
    f_plus = f - gamma / 2 * grad - (1 / (2 * gamma) - L / 2) * R + gamma / 2 * (E - slack[0]) - slack[1]
    E_plus = (1 - rate) * E + growth * R - slack[2]
    weight = gamma / rate
    kept = (1 - L * gamma - 2 * growth / rate * gamma**2) / (2 * gamma)
    drop = (1 - gamma * mu) * (f + weight * E) - (f_plus + weight * E_plus) - kept * R
    certificate = [gamma / 2 * slack[0], slack[1], weight * slack[2], gamma / 2 * slack[4], weight * room * E]
    return nonnegative(
        claim, drop.subs(mu, (rate / 2 - room) / gamma), [sp.sympify(t).subs(mu, (rate / 2 - room) / gamma) for t in certificate]
    )


def telescope() -> Step:
    start, now, grad, total, c = sp.symbols("Phi_0 Phi_T grad_T Sigma c", nonnegative=True)
    held = start - now - c * total  # non-negative by the induction hypothesis: equal to slack[0]
    after = now - c * grad - slack[1]
    return nonnegative(
        r"Telescoping, by induction on $T$: if $\Phi_{t+1}\le\Phi_t-c\,a_t$ for all $t$, then $c\sum_{t<T}a_t\le\Phi_0-\Phi_T$.",
        (start - after - c * (total + grad)).subs(start, sp.solve(held - slack[0], start)[0]),
        [slack[0], slack[1]],
    )

r"""T6: MARINA and VR-MARINA with unbiased compressors, and what hostile workers can do to them.

Problem: minimise f = (1/n) sum f_i over n workers, f of them possibly hostile, sending compressed gradient differences.
Algorithm: ``mango.feedback.Marina``, ``VRMarina``, ``ByzVRMarina`` with ``mango.feedback.aggregators``.
Guarantee: Gorbunov, Burlachenko, Li, Richtárik 2021 (arXiv:2102.07845); Gorbunov, Horváth, Richtárik, Gidel 2022 (arXiv:2206.00529); the
aggregators' constants are derived here. The recursion (1) is exact for Rand-k and kappa is attained by the trimmed mean and the median; the
rates are valid. Needed: unbiased compression, and an honest majority with a robust aggregator.

>>> from mango.feedback.aggregators import TrimmedMean
>>> TrimmedMean(delta=0.25).kappa(workers=8, attackers=2)
0.5
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product

import sympy as sp

from theory import aggregation
from theory import descent as shared
from theory.algebra import everywhere, identity, nonnegative
from theory.base import Step, Theorem
from theory.t6_measure import check

STATEMENT = r"""
Let $f=\frac1n\sum_{i=1}^nf_i$ be bounded below by $f^\star$ and $L$-smooth, each $f_i$ $L_i$-smooth, $\tilde L^2=\frac1n\sum_iL_i^2$,
$f_i=\frac1m\sum_jf_{ij}$; let the $C_i$ be independent and unbiased, $\mathbb E\,C_i(u)=u$, $\mathbb E\|C_i(u)-u\|^2\le\omega\|u\|^2$.
VR-MARINA iterates $x^{t+1}=x^t-\gamma g^t$, $g^0=\nabla f(x^0)$, and $g^{t+1}=\nabla f(x^{t+1})$ with probability $p\in(0,1]$, else
$g^{t+1}=g^t+\frac1n\sum_iC_i(\hat\Delta_i)$, where $\hat\Delta_i$ is the mean of $\nabla f_{ij}(x^{t+1})-\nabla f_{ij}(x^t)$ over $b$
indices $j$ drawn independently and uniformly; $\Delta_i=\nabla f_i(x^{t+1})-\nabla f_i(x^t)$, $\mathrm{Var}_i$ is the variance of one
draw, $\frac1n\sum_i\mathrm{Var}_i\le\mathcal L^2\|x^{t+1}-x^t\|^2$, $e^t=g^t-\nabla f(x^t)$, $\Delta=f(x^0)-f^\star$. MARINA takes all
$j$: $\mathrm{Var}_i=0$, $\mathcal L=0$.
\begin{enumerate}
\item $\displaystyle\mathbb
      E\|e^{t+1}\|^2\le(1-p)\Bigl[\|e^t\|^2+\frac1{n^2}\sum_i\Bigl(\omega\|\Delta_i\|^2+(1+\omega)\frac{\mathrm{Var}_i}b\Bigr)\Bigr]
      \le(1-p)\|e^t\|^2+A\|x^{t+1}-x^t\|^2$, with equality on the left for Rand-$k$ ($\omega=\frac dk-1$), and
      $A=\frac{1-p}n\bigl(\omega\tilde L^2+(1+\omega)\frac{\mathcal L^2}b\bigr)$. If $\gamma\le(L+\sqrt{A/p})^{-1}$, then
      $\frac1K\sum_{t<K}\mathbb E\|\nabla f(x^t)\|^2\le\frac{2\Delta}{\gamma K}$. If also $\|\nabla f\|^2\ge2\mu(f-f^\star)$ and
      $\gamma\le\min\{(L+\sqrt{2A/p})^{-1},\frac p{2\mu}\}$, then $\mathbb E[f(x^K)-f^\star]\le(1-\gamma\mu)^K\Delta$.
\item Of $n$ workers let $G\ge2$ be good (sums, $f$, $\tilde L$, $\mathcal L$ now refer to these) and let the server replace the means by
      an aggregate with $\mathbb E\|\hat x-\bar x\|^2\le c\delta\,\frac1{G(G-1)}\sum_{i\ne l}\mathbb E\|x_i-x_l\|^2$ for the good messages
      $x_i$, whatever the others send. Let $\frac1G\sum_i\|\nabla f_i(x^t)-\nabla f(x^t)\|^2\le\zeta^2$ along the iterates,
      $\frac1G\sum_i\|\Delta_i-\bar\Delta\|^2\le L_\pm^2\|x^{t+1}-x^t\|^2$, $\bar\Delta=\frac1G\sum_i\Delta_i$, and $V=\omega\tilde
      L^2+(1+\omega)\frac{\mathcal L^2}b$. Then $\mathbb E\|e^{t+1}\|^2\le(1-\tfrac
      p2)\|e^t\|^2+(1-p)B\|x^{t+1}-x^t\|^2+p\,c\delta\tfrac{2G}{G-1}\zeta^2$ with $B=(1+\frac p2)\frac
      VG+(1+\frac2p)c\delta\bigl(2V+\frac{2G}{G-1}L_\pm^2\bigr)$, and $\gamma\le(L+\sqrt{A'})^{-1}$, $A'=\frac2p(1-p)B$, gives
      $\displaystyle\frac1K\sum_{t<K}\mathbb E\|\nabla f(x^t)\|^2\le\frac{2\Delta}{\gamma K}+\frac{2\,\mathbb
      E\|e^0\|^2}{pK}+\frac{4G}{G-1}c\delta\zeta^2.$
\item Let $\nu<n/2$ be the number of hostile workers, $G=n-\nu$, $\bar x$ and $v$ the mean and variance $\frac1G\sum_i\|x_i-\bar x\|^2$ of
      the good messages. Then $\|\hat x-\bar x\|^2\le\kappa v$, and $c\delta=\frac{G-1}{2G}\kappa$ satisfies (2), with
      $\kappa=\frac\nu{n-2\nu}$ for the coordinate-wise trimmed mean, $\kappa=\frac b{G-b}$, $b=\lceil\frac n2\rceil-1$, for the
      coordinate-wise median, $\frac{4G^2}{(n-2\nu)^2}$ for the geometric median, $\bigl(\sqrt{2G/(n-2\nu)}+\sqrt{\nu/(n-2\nu)}\bigr)^2$
      for Krum with $n-\nu-1$ neighbours, and $\bigl(\sqrt{\kappa_z}+\sqrt{G(1+\kappa_z)/(n-\lceil n/2\rceil+1-\nu)}\bigr)^2$ for clipping
      about the median ($\kappa_z$ its constant) at the median distance. The first two are attained.
\end{enumerate}
"""


def proof() -> list[Step]:
    return [shared.young(), shared.variance(), shared.descent(), shared.step_condition(), *_marina(), *_byzantine(), *aggregation.proof()]


def _marina() -> list[Step]:
    d, k, omega, b, n = sp.symbols("d k omega b n", positive=True)
    u, D2, Var, R = sp.symbols("u D2 Var R", nonnegative=True)
    x1, x2 = shared.slack[:2]
    p, gamma, K, Delta = shared.p, shared.gamma, sp.Symbol("K", positive=True), sp.Symbol("Delta", positive=True)
    Lt, Lc = sp.symbols("Ltilde calL", positive=True)
    keep = k / d
    odds = sp.Symbol("odds", positive=True)
    rest = odds / (1 + odds)  # 1 - p
    A = rest / n * (omega * Lt**2 + (1 + omega) * Lc**2 / b)
    mean_D, mean_V = Lt**2 * R - x1, Lc**2 * R - x2  # means over i of |Delta_i|^2 and Var_i
    return [
        identity(
            r"(1) Rand-$k$ keeps a coordinate $u$ with probability $\frac kd$ as $\frac dku$: the mean is $u$,",
            keep * (d / k * u),
            u,
        ),
        identity(
            r"(1) and the variance is $\frac kd(\frac dk-1)^2u^2+(1-\frac kd)u^2=(\frac dk-1)u^2$; summed over coordinates, $\omega=\frac "
            r"dk-1$ with equality.",
            keep * (d / k * u - u) ** 2 + (1 - keep) * u**2,
            (d / k - 1) * u**2,
        ),
        nonnegative(
            r"(1) With $\mathbb E\,\hat\Delta_i=\Delta_i$ and $\mathbb E\|\hat\Delta_i-\Delta_i\|^2=\mathrm{Var}_i/b$: "
            r"$\mathbb E\|C_i(\hat\Delta_i)-\Delta_i\|^2=\mathbb E\|C_i(\hat\Delta_i)-\hat\Delta_i\|^2+\frac{\mathrm{Var}_i}b"
            r"\le\omega\bigl(\|\Delta_i\|^2+\frac{\mathrm{Var}_i}b\bigr)+\frac{\mathrm{Var}_i}b$ "
            r"(unbiasedness removes the cross term; equality for Rand-$k$).",
            omega * D2 + (1 + omega) * Var / b - ((omega * (D2 + Var / b) - x1) + Var / b),
            [x1],
        ),
        everywhere(
            r"(1) The workers' errors are independent with mean zero, so $\mathbb "
            r"E\|e^t+\frac1n\sum_i\xi_i\|^2=\|e^t\|^2+\frac1{n^2}\sum_i\mathbb E\|\xi_i\|^2$, and with "
            r"probability $p$ the error is $0$: the recursion holds with equality for Rand-$k$. (Enumerated exactly over all draws of "
            r"samples, coordinates "
            r"and coin, for $n=2$, $m=2$, $d=3$, $k=1,2$, $b=1,2$.)",
            _enumerated,
            [(k_, b_, p_) for k_, b_ in ((1, 1), (2, 1), (1, 2)) for p_ in (Fraction(1, 4), Fraction(2, 3))],
        ),
        nonnegative(
            r"(1) By smoothness $\frac1n\sum_i\|\Delta_i\|^2\le\tilde L^2\|x^{t+1}-x^t\|^2$, so $\mathbb "
            r"E\|e^{t+1}\|^2\le(1-p)\|e^t\|^2+A\|x^{t+1}-x^t\|^2$.",
            rest * D2 + A * R - rest * (D2 + (omega * mean_D + (1 + omega) * mean_V / b) / n),  # D2 stands for |e|^2
            [rest * omega * x1 / n, rest * (1 + omega) * x2 / (n * b)],
        ),
        shared.lyapunov(
            r"(1) With descent, $\Phi=f-f^\star+\frac\gamma{2p}\|e\|^2$ satisfies $\mathbb E\,\Phi_{t+1}\le\Phi_t-\frac\gamma2\|\nabla "
            r"f(x^t)\|^2-\frac1{2\gamma}"
            r"(1-L\gamma-\frac Ap\gamma^2)\|x^{t+1}-x^t\|^2$; the last term is $\le0$ by the step size ($M=\sqrt{A/p}$).",
            gamma / (2 * p),
            1 - p,
            n,
        ),
        shared.telescope(),
        identity(
            r"(1) Summing, with $\Phi_0=\Delta$ since $e^0=0$, gives $\frac{2\Delta}{\gamma K}$.",
            2 / (gamma * K) * Delta,
            2 * Delta / (gamma * K),
        ),
        shared.lyapunov_pl(
            r"(1, PL) $\Psi=f-f^\star+\frac\gamma p\|e\|^2$ satisfies $\mathbb "
            r"E\,\Psi_{t+1}\le(1-\gamma\mu)\Psi_t-\frac1{2\gamma}(1-L\gamma-\frac{2A}p\gamma^2)"
            r"\|x^{t+1}-x^t\|^2$ if $\gamma\mu\le\frac p2$; iterate from $\Psi_0=\Delta$.",
            p,
            n,
        ),
    ]


def _byzantine() -> list[Step]:
    G, odds, Lt, Lc, Lh, omega, b = sp.symbols("G odds Ltilde calL Lpm omega b", positive=True)
    cd, e2, R, s2, zeta2 = sp.symbols("c_delta e2 R S_2 zeta2", nonnegative=True)
    s1 = sp.Symbol("S_1", real=True)
    x1, x2, x3, x4, x5 = shared.slack
    g1 = sp.Symbol("G_1", positive=True)  # G - 1
    V = sp.Symbol("V", positive=True)
    p, rest = 1 / (1 + odds), odds / (1 + odds)
    # compressed round: error of the good mean, pairwise spread of the good messages, aggregation error
    mean_error = e2 + V * R / G - x1
    spread = (2 * V + 2 * G / g1 * Lh**2) * R - x2
    compressed = (1 + p / 2) * mean_error + (1 + 2 / p) * (cd * spread - x3) - x4
    full = cd * (2 * G / g1 * (zeta2 - x5))
    B = (1 + p / 2) * V / G + (1 + 2 / p) * cd * (2 * V + 2 * G / g1 * Lh**2)
    gamma, K, Delta, e0 = sp.symbols("gamma K Delta e_0", positive=True)
    floor = p * cd * 2 * G / g1 * zeta2
    return [
        identity(
            r"(2) For numbers $x_i$ with sums $S_1$, $S_2$ of values and squares: $\frac1{G(G-1)}\sum_{i\ne "
            r"l}\|x_i-x_l\|^2=\frac{2G}{G-1}\cdot\frac1G\sum_i\|x_i-\bar x\|^2$.",
            (2 * (g1 + 1) * s2 - 2 * s1**2) / ((g1 + 1) * g1),
            2 * (g1 + 1) / g1 * (s2 / (g1 + 1) - (s1 / (g1 + 1)) ** 2),
        ),
        nonnegative(
            r"(2) Full round: the good messages are $\nabla f_i(x^{t+1})$, their mean is $\nabla f(x^{t+1})$, so $\mathbb "
            r"E\|e^{t+1}\|^2\le c\delta\frac{2G}{G-1}\zeta^2$.",
            cd * 2 * G / g1 * zeta2 - (cd * (2 * G / g1 * (zeta2 - x1)) - x2),
            [cd * 2 * G / g1 * x1, x2],
        ),
        nonnegative(
            r"(2) Compressed round: by (1) the mean $\bar g$ of the good $g^t+C_i(\hat\Delta_i)$ has $\mathbb E\|\bar g-\nabla "
            r"f(x^{t+1})\|^2\le\|e^t\|^2+\frac VG\|x^{t+1}-x^t\|^2$, "
            r"with $\mathbb E\|C_i(\hat\Delta_i)-\Delta_i\|^2$ at most $V\|x^{t+1}-x^t\|^2$ in the mean over $i$.",
            V.subs(V, omega * Lt**2 + (1 + omega) * Lc**2 / b) * R - (omega * (Lt**2 * R - x1) + (1 + omega) * (Lc**2 * R - x2) / b),
            [omega * x1, (1 + omega) * x2 / b],
        ),
        nonnegative(
            r"(2) By independence $\mathbb "
            r"E\|C_i(\hat\Delta_i)-C_l(\hat\Delta_l)\|^2=\|\Delta_i-\Delta_l\|^2+\mathrm{var}_i+\mathrm{var}_l$ for $i\ne l$; the mean "
            r"over pairs is at most "
            r"$\bigl(\frac{2G}{G-1}L_\pm^2+2V\bigr)\|x^{t+1}-x^t\|^2$.",
            (2 * G / g1 * Lh**2 + 2 * V) * R - (2 * G / g1 * (Lh**2 * R - x1) + 2 * (V * R - x2)),
            [2 * G / g1 * x1, 2 * x2],
        ),
        nonnegative(
            r"(2) Young with $s=\frac p2$ joins $\bar g-\nabla f(x^{t+1})$ and $g^{t+1}-\bar g$; with $(1-p)(1+\frac p2)\le1-\frac p2$ "
            r"the two rounds together give the recursion.",
            (1 - p / 2) * e2 + rest * B * R + floor - (rest * compressed + p * full),
            [
                (p / 2 * p) * e2,
                rest * (1 + p / 2) * x1,
                rest * (1 + 2 / p) * cd * x2,
                rest * (1 + 2 / p) * x3,
                rest * x4,
                p * cd * 2 * G / g1 * x5,
            ],
        ),
        shared.lyapunov(
            r"(2) With descent, $\Phi=f-f^\star+\frac\gamma p\|e\|^2$ satisfies $\mathbb E\,\Phi_{t+1}\le\Phi_t-\frac\gamma2\|\nabla "
            r"f(x^t)\|^2-\frac1{2\gamma}(1-L\gamma-A'\gamma^2)"
            r"\|x^{t+1}-x^t\|^2$ plus $\frac\gamma p$ times the last term of the recursion.",
            shared.gamma / shared.p,
            1 - shared.p / 2,
            G,
        ),
        identity(r"(2) where $A'=2\cdot\frac\gamma p\cdot(1-p)B/\gamma$.", 2 * (gamma / p) * (rest * B) / gamma, 2 / p * rest * B),
        identity(
            r"(2) Summing and multiplying by $\frac2{\gamma K}$: $\frac{2\Delta}{\gamma "
            r"K}+\frac{2\|e^0\|^2}{pK}+\frac{4G}{G-1}c\delta\zeta^2$.",
            2 / (gamma * K) * (Delta + gamma / p * e0 + K * gamma / p * floor),
            2 * Delta / (gamma * K) + 2 * e0 / (p * K) + 4 * G / g1 * cd * zeta2,
        ),
    ]


def _enumerated(case: tuple[int, int, Fraction]) -> bool:
    """E|e+|^2 over all draws, in rational arithmetic, against (1) with equality."""
    k, batch, p = case
    d, n, m = 3, 2, 2
    error = (Fraction(1, 2), Fraction(-1), Fraction(2, 3))
    changes = [[(1, -2, 3), (0, 1, -1)], [(2, 2, -1), (-1, 0, 4)]]  # sample gradients' changes, by worker and sample
    means = [[Fraction(sum(sample[c] for sample in rows), m) for c in range(d)] for rows in changes]
    subsets = list(combinations(range(d), k))
    draws = list(product(product(range(m), repeat=batch), subsets))  # of one worker, all equally likely

    def sent(i: int, draw: tuple[tuple[int, ...], tuple[int, ...]]) -> list[Fraction]:
        samples, kept = draw
        return [Fraction(d, k) * Fraction(sum(changes[i][j][c] for j in samples), batch) if c in kept else Fraction(0) for c in range(d)]

    outcomes = [[sent(i, draw) for draw in draws] for i in range(n)]
    total = Fraction(0)
    for joint in product(*outcomes):
        total += _squared([error[c] + sum((joint[i][c] - means[i][c] for i in range(n)), Fraction(0)) / n for c in range(d)])
    expected = (1 - p) * total / len(draws) ** n  # with probability p the error is 0
    omega = Fraction(d, k) - 1
    bound = _squared(error)
    for i in range(n):
        variance = sum((_squared([changes[i][j][c] - means[i][c] for c in range(d)]) for j in range(m)), Fraction(0)) / m
        bound += (omega * _squared(means[i]) + (1 + omega) * variance / batch) / n**2
    return expected == (1 - p) * bound


def _squared(vector: Sequence[Fraction]) -> Fraction:
    return sum((entry * entry for entry in vector), Fraction(0))


THEOREM = Theorem(
    id="T6",
    title="MARINA, VR-MARINA and hostile workers",
    statement=STATEMENT,
    source="gorbunov2021marina; gorbunov2023byzantine; the aggregators' constants are derived here",
    tight=True,
    modules=(
        "mango.feedback.marina",
        "mango.feedback.aggregators",
        "mango.feedback.attacks",
        "mango.feedback.base",
        "mango.feedback.rates",
        "mango.compressors",
        "mango.codecs",
    ),
    proof=proof,
    check=check,
)

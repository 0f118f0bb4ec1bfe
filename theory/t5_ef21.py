r"""T5: EF21 converges with any contractive compressor, and with a rounded state under a condition on the rounding.

Problem: minimise f = (1/n) sum f_i, each f_i known to one worker, sending compressed vectors.
Algorithm: ``mango.feedback.EF21``.
Guarantee: Richtárik, Sokolov, Fatkhullin 2021 (arXiv:2106.05203), theorems 1 and 2; the quantised state is derived here. Valid, not tight
(T9 certifies how far from tight). Without feedback top-1 diverges on three workers (arXiv:2002.12410, example 1).

>>> from mango.feedback import rates
>>> print(round(rates.ef21(1 / 3).step(103 / 6, 69 / 2), 5))
0.00586
"""

from __future__ import annotations

import sympy as sp

from theory import descent as shared
from theory.algebra import everywhere, identity, nonnegative
from theory.base import Step, Theorem
from theory.t5_measure import check

STATEMENT = r"""
Let $f=\frac1n\sum_{i=1}^n f_i$ be bounded below by $f^\star$ and $L$-smooth, each $f_i$ $L_i$-smooth, $\tilde L^2=\frac1n\sum_iL_i^2$,
and let $C$ be $\alpha$-contractive, $\alpha\in(0,1]$: $\mathbb E\|C(u)-u\|^2\le(1-\alpha)\|u\|^2$ for all $u$, its randomness independent
of the past. EF21 iterates $x^{t+1}=x^t-\gamma g^t$, $g^t=\frac1n\sum_ig_i^t$, $g_i^{t+1}=g_i^t+C(\nabla f_i(x^{t+1})-g_i^t)$. Put
$q=\sqrt{1-\alpha}$, $\theta=1-q$, $\beta=\frac{1-\alpha}{1-q}$, $G_t=\frac1n\sum_i\|g_i^t-\nabla f_i(x^t)\|^2$, $\Delta=f(x^0)-f^\star$.
\begin{enumerate}
\item If $\gamma\le\bigl(L+\tilde L\sqrt{\beta/\theta}\bigr)^{-1}$, where $\sqrt{\beta/\theta}=\frac{q}{1-q}$ (so $\gamma\le\frac{1-q}{L}$
      for $n=1$), then $\displaystyle\frac1T\sum_{t<T}\mathbb E\|\nabla f(x^t)\|^2\le\frac{2\Delta}{\gamma T}+\frac{\mathbb E\,G_0}{\theta
      T}.$
\item If also $\|\nabla f(x)\|^2\ge2\mu(f(x)-f^\star)$ for all $x$ and $\gamma\le\min\bigl\{\bigl(L+\tilde
      L\sqrt{2\beta/\theta}\bigr)^{-1},\frac{\theta}{2\mu}\bigr\}$, then $\Psi_t=f(x^t)-f^\star+\frac\gamma\theta G_t$ satisfies $\mathbb
      E\,\Psi_T\le(1-\gamma\mu)^T\,\mathbb E\,\Psi_0$.
\item Let the state be rounded, $g_i^{t+1}=R\bigl(g_i^t+C(\nabla f_i(x^{t+1})-g_i^t)\bigr)$ with $\mathbb E\|R(u)-u\|^2\le\rho^2\|u\|^2$
      for all $u$, let $\frac1n\sum_i\|\nabla f_i(x^t)-\nabla f(x^t)\|^2\le\zeta^2$ along the iterates ($\zeta=0$ if $n=1$), and let
      $a=(1+\rho)q<1$ and $\kappa_s=\frac{(1+s)\rho^2}{(1-a)^2}<1$ for some $s>0$. If $\gamma\le\bigl(L+\sqrt{1+1/s}\,\frac{a}{1-a}\tilde
      L\bigr)^{-1}$, then $\displaystyle\frac{1-\kappa_s}{T}\sum_{t<T}\mathbb E\|\nabla f(x^t)\|^2\le\frac{2\Delta}{\gamma
      T}+\frac{\mathbb E\,G_0}{(1-a)T}+\kappa_s\zeta^2.$ Such an $s$ exists if and only if $a+\rho<1$; the library asks for $s=1$.
\item Feedback is needed: for $n=3$, $f_i(x)=\langle a_i,x\rangle^2+\frac14\|x\|^2$ with $a_i=(2,2,2)-5e_i$, and $C$ = top-1
      ($\alpha=\frac13$), the iteration $x^{t+1}=x^t-\frac\gamma3\sum_iC(\nabla f_i(x^t))$ from $x^0=b(1,1,1)$ gives
      $x^t=(1+\frac{11\gamma}6)^tx^0$ for every $\gamma>0$, whereas (2) applies to EF21 with $L=\frac{103}6$, $\tilde L=\frac{69}2$,
      $\mu=\frac76$.
\end{enumerate}
"""


def proof() -> list[Step]:
    return [shared.young(), shared.variance(), shared.descent(), *_recursion(), *_rates(), *_quantised(), *_divergence()]


def _recursion() -> list[Step]:
    o, Li = sp.symbols("o L_i", positive=True)
    q, theta = 1 / (1 + o), o / (1 + o)  # 0 < q < 1; q = 0 is exact communication, G = 0 from the first message on
    beta = q**2 / theta
    D2, R = sp.symbols("D2 R", nonnegative=True)  # |g_i - grad f_i(x)|^2, |x+ - x|^2
    x1, x2, x3 = shared.slack[:3]
    change = Li**2 * R - x1  # |grad f_i(x+) - grad f_i(x)|^2, by smoothness
    gap = (1 + (1 / q - 1)) * D2 + (1 + 1 / (1 / q - 1)) * change - x2  # |grad f_i(x+) - g_i|^2, by Young with s = 1/q - 1
    after = q**2 * gap - x3  # E|g_i+ - grad f_i(x+)|^2, by contraction
    return [
        identity(r"With $s=1/q-1$: $(1-\alpha)(1+s)=q=1-\theta$.", q**2 * (1 + (1 / q - 1)), 1 - theta),
        identity(r"With $s=1/q-1$: $(1-\alpha)(1+1/s)=\frac{1-\alpha}{1-q}=\beta$.", q**2 * (1 + 1 / (1 / q - 1)), beta),
        nonnegative(
            r"Hence, by contraction at $u=\nabla f_i(x^{t+1})-g_i^t$, Young and smoothness, $\mathbb E\|g_i^{t+1}-\nabla "
            r"f_i(x^{t+1})\|^2\le"
            r"(1-\theta)\|g_i^t-\nabla f_i(x^t)\|^2+\beta L_i^2\|x^{t+1}-x^t\|^2$; the mean over $i$ is "
            r"$\mathbb E\,G_{t+1}\le(1-\theta)G_t+\beta\tilde L^2\|x^{t+1}-x^t\|^2$.",
            (1 - theta) * D2 + beta * Li**2 * R - after,
            [beta * x1, q**2 * x2, x3],
        ),
        identity(r"$\sqrt{\beta/\theta}=\frac q{1-q}$.", beta / theta, (q / (1 - q)) ** 2),
        identity(r"For $n=1$: $L+L\,\frac q{1-q}=\frac L{1-q}$.", Li + Li * q / (1 - q), Li / (1 - q)),
    ]


def _rates() -> list[Step]:
    beta, Lt = sp.symbols("beta Ltilde", positive=True)
    gamma, theta, mu = shared.gamma, shared.theta, shared.mu
    T, Delta, G0 = sp.symbols("T Delta G_0", positive=True)
    return [
        shared.step_condition(),
        shared.lyapunov(
            r"(1) With $\|g^t-\nabla f(x^t)\|^2\le G_t$ (Jensen), descent and the recursion, $\Phi=f-f^\star+\frac{\gamma}{2\theta}G$ "
            r"satisfies "
            r"$\mathbb E\,\Phi_{t+1}\le\Phi_t-\frac\gamma2\|\nabla f(x^t)\|^2-\frac1{2\gamma}(1-L\gamma-M^2\gamma^2)\|x^{t+1}-x^t\|^2$, "
            r"$M=\tilde L\sqrt{\beta/\theta}$; the last term is $\le0$ by the step size.",
            gamma / (2 * theta),
            1 - theta,
            beta * Lt**2,
        ),
        identity(
            r"(1) where $M^2=\beta\tilde L^2/\theta$ comes from the weight: $2\cdot\frac\gamma{2\theta}\cdot\beta\tilde L^2/\gamma$.",
            2 * gamma / (2 * theta) * beta * Lt**2 / gamma,
            (Lt * sp.sqrt(beta / theta)) ** 2,
        ),
        shared.telescope(),
        identity(
            r"(1) Summing, dropping $\Phi_T\ge0$ and multiplying by $\frac2{\gamma T}$ gives the bound.",
            2 / (gamma * T) * (Delta + gamma / (2 * theta) * G0),
            2 * Delta / (gamma * T) + G0 / (theta * T),
        ),
        shared.lyapunov_pl(
            r"(2) With $\|\nabla f\|^2\ge2\mu(f-f^\star)$ and $\gamma\mu\le\theta/2$: $\mathbb "
            r"E\,\Psi_{t+1}\le(1-\gamma\mu)\Psi_t-\frac1{2\gamma}"
            r"(1-L\gamma-M^2\gamma^2)\|x^{t+1}-x^t\|^2$ with $M=\tilde L\sqrt{2\beta/\theta}$; iterate.",
            theta,
            beta * Lt**2,
        ),
        nonnegative(
            r"(2) $1-\gamma\mu\ge0$, so that iterating keeps the inequality: $\gamma\mu\le\frac\theta2\le\frac12$.",
            (1 - gamma * mu).subs(mu, (sp.Rational(1, 2) - shared.slack[0]) / gamma),
            [sp.Rational(1, 2), shared.slack[0]],
        ),
    ]


def _quantised() -> list[Step]:
    o, s, rho = sp.symbols("o s rho", positive=True)
    a, rest = 1 / (1 + o), o / (1 + o)  # 0 < a < 1, rest = 1 - a
    q = a / (1 + rho)
    N, g, D, y = sp.symbols("N g D y", nonnegative=True)
    x1, x2, x3, room = shared.slack[:4]
    # lengths in L2: N = |g_i - grad f_i(x+)|, c = |u - grad f_i(x+)| <= q N, |u| <= c + |grad f_i(x+)|, |R(u) - u| <= rho |u|
    c = q * N - x1
    after = c + rho * (c + g - x2) - x3
    P, S, Z, z = sp.symbols("P S Z z", nonnegative=True)  # D_T^2, sum of D_t^2 and of z_t over t < T, z_T
    start = P + rest * S - Z + x1  # D_0^2, by the induction hypothesis
    R, Sg, SR, G0, Lt, L, gamma, zeta2, T = sp.symbols("R S_g S_R G_0 Ltilde L gamma zeta2 T", positive=True)
    kappa = (1 + s) * rho**2 / rest**2
    M2 = (1 + 1 / s) * (a * Lt / rest) ** 2
    drive = ((1 + 1 / s) * a**2 * Lt**2 * SR + (1 + s) * rho**2 * (Sg + T * zeta2 - x2)) / rest
    SG = (G0 + drive - x1) / rest  # sum of G_t over t < T
    Delta = gamma / 2 * Sg + (1 / (2 * gamma) - L / 2) * SR - gamma / 2 * SG + x3
    bound = 2 * Delta / gamma + G0 / rest + kappa * T * zeta2
    return [
        nonnegative(
            r"(3) In $L_2$-norms $\|X\|_2=(\mathbb E\|X\|^2)^{1/2}$ given the past (Minkowski), with $u=g_i^t+C(\nabla "
            r"f_i(x^{t+1})-g_i^t)$: "
            r"$\|g_i^{t+1}-\nabla f_i(x^{t+1})\|_2\le\|u-\nabla f_i(x^{t+1})\|_2+\rho\|u\|_2\le a\,\|g_i^t-\nabla f_i(x^{t+1})\|"
            r"+\rho\|\nabla f_i(x^{t+1})\|$, since $\|u\|_2\le\|u-\nabla f_i(x^{t+1})\|_2+\|\nabla f_i(x^{t+1})\|$.",
            a * N + rho * g - after,
            [(1 + rho) * x1, rho * x2, x3],
        ),
        nonnegative(
            r"(3) By smoothness $D_i=\|g_i-\nabla f_i(x)\|$ obeys $\|D_i^+\|_2\le aD_i+y_i$, $y_i=aL_i\|x^+-x\|+\rho\|\nabla f_i(x^+)\|$; "
            r"and "
            r"$(aD+y)^2\le aD^2+\frac{y^2}{1-a}$, the difference being $a(1-a)\bigl(D-\frac y{1-a}\bigr)^2$.",
            a * D**2 + y**2 / rest - (a * D + y) ** 2,
            [a * rest * (D - y / rest) ** 2],
        ),
        nonnegative(
            r"(3) $y_i^2\le(1+\frac1s)a^2L_i^2\|x^+-x\|^2+(1+s)\rho^2\|\nabla f_i(x^+)\|^2$ (Young).",
            (1 + 1 / s) * a**2 * N**2 + (1 + s) * rho**2 * g**2 - (a * N + rho * g) ** 2,
            [(a * N - s * rho * g) ** 2 / s],
        ),
        nonnegative(
            r"(3) If $D_{t+1}^2\le aD_t^2+z_t$, then $D_T^2+(1-a)\sum_{t<T}D_t^2\le D_0^2+\sum_{t<T}z_t$, by induction on $T$.",
            start + Z + z - (a * P + z - x2) - rest * (S + P),
            [x1, x2],
        ),
        nonnegative(
            r"(3) Used at $T-1$: $(1-a)\sum_{t<T}D_t^2\le D_{T-1}^2+(1-a)\sum_{t<T-1}D_t^2\le D_0^2+\sum_{t<T-1}z_t$, where the $z_t$ "
            r"involve "
            r"$\nabla f_i(x^1),\dots,\nabla f_i(x^{T-1})$ only. Average over $i$, with $\frac1n\sum_i\|\nabla f_i\|^2\le\|\nabla "
            r"f\|^2+\zeta^2$ (Jensen).",
            start + Z - rest * (S + P),
            [x1, a * P],
        ),
        nonnegative(
            r"(3) Put this into the sum of the descent inequalities, $\frac\gamma2\sum\|\nabla f\|^2\le\Delta-(\frac1{2\gamma}-\frac "
            r"L2)\sum\|x^{t+1}-x^t\|^2"
            r"+\frac\gamma2\sum G_t$: with $M=\sqrt{1+1/s}\,\frac a{1-a}\tilde L$ and $1-L\gamma-M^2\gamma^2\ge0$, "
            r"$(1-\kappa_s)\sum\|\nabla f\|^2\le\frac{2\Delta}\gamma+\frac{G_0}{1-a}+\kappa_sT\zeta^2$.",
            (bound - (1 - kappa) * Sg).subs(L, (1 - M2 * gamma**2 - room) / gamma),
            [room * SR / gamma**2, x1 / rest, kappa * x2, 2 * x3 / gamma],
        ),
        nonnegative(
            r"(3) If $1-a=\rho+r$, $r>0$, then $s=r/\rho$ gives $1-\kappa_s=\frac r{\rho+r}>0$.",
            1 - (1 + R / rho) * rho**2 / (rho + R) ** 2,
            [R / (rho + R)],
            strict=True,
        ),
        nonnegative(
            r"(3) If $1-a\le\rho$, then $\kappa_s\ge1+s>1$ for every $s>0$ (put $\rho=1-a+r$).",
            (1 + s) * (rest + x1) ** 2 / rest**2 - (1 + s),
            [(1 + s) * (2 * rest * x1 + x1**2) / rest**2],
        ),
    ]


def _divergence() -> list[Step]:
    b, step = sp.symbols("b gamma", positive=True)
    x = sp.Matrix([b, b, b])
    vectors = [sp.Matrix([2, 2, 2]) - 5 * sp.Matrix([1 if k == i else 0 for k in range(3)]) for i in range(3)]
    rows = [2 * v.dot(x) * v + x / 2 for v in vectors]
    kept = [sp.Matrix([entry if abs(entry / b) == max(abs(other / b) for other in row) else 0 for entry in row]) for row in rows]
    gram = sum((v * v.T for v in vectors), sp.zeros(3))
    hessian = sp.Rational(2, 3) * gram + sp.eye(3) / 2
    return [
        everywhere(
            r"(4) $\nabla f_i(b,b,b)=\frac b2(9,9,9)-10b\,e_i$: the largest entry, $-\frac{11}2b$ at $i$, is the only one of its size.",
            lambda i: rows[i] == b / 2 * sp.Matrix([9, 9, 9]) - 10 * b * sp.eye(3)[:, i] and sum(entry != 0 for entry in kept[i]) == 1,
            range(3),
        ),
        identity(
            r"(4) $x-\frac\gamma3\sum_iC(\nabla f_i(x))=(1+\frac{11\gamma}6)\,x$ at $x=b(1,1,1)$, for every $b$.",
            x - step / 3 * sum(kept, sp.zeros(3, 1)),
            (1 + sp.Rational(11, 6) * step) * x,
        ),
        everywhere(
            r"(4) $\nabla^2f=\frac23\sum_ia_ia_i^\top+\frac12I$ has the eigenvalues $\frac{103}6,\frac{103}6,\frac76$, and "
            r"$\nabla^2f_i=2a_ia_i^\top+\frac12I$ "
            r"has $\frac{69}2,\frac12,\frac12$.",
            lambda pair: pair[0].eigenvals() == pair[1],
            [(hessian, {sp.Rational(103, 6): 2, sp.Rational(7, 6): 1})]
            + [(2 * v * v.T + sp.eye(3) / 2, {sp.Rational(69, 2): 1, sp.Rational(1, 2): 2}) for v in vectors],
        ),
    ]


THEOREM = Theorem(
    id="T5",
    title="EF21, exact and rounded states",
    statement=STATEMENT,
    source="richtarik2021ef21, theorems 1 and 2; the rounded state is derived here",
    tight=False,
    modules=("mango.feedback.ef21", "mango.feedback.base", "mango.feedback.rates", "mango.compressors", "mango.codecs"),
    proof=proof,
    check=check,
)

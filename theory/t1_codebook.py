r"""T1: the exact worst case of a block-absmax codebook quantiser (NF4, FP4, 8-bit dynamic).

Problem: how much of a tensor's energy can storing it in few bits destroy, whatever the tensor?
Algorithm: ``mango.codecs`` nf4, fp4, int8: each block of B values is divided by its absmax and rounded to the nearest level of a codebook.
Guarantee (derived here): a closed form, the maximum over the codebook's gaps. Tight: the constructed block reaches it, and gradient ascent
and evolution, which do not know it, come within 0.1 % of it. int8 rounds through a table of 65 536 entries as bitsandbytes' CPU kernel
does: the form then holds with the displaced thresholds, and a safe bound needs the displacement only.

>>> from theory.codebooks import DYNAMIC, NF4, contraction
>>> print(f"{float(contraction(NF4, 64)):.10f} {float(contraction(NF4, 128)):.10f} {float(contraction(NF4, 256)):.10f}")
0.8845101952 0.7916334077 0.6542385526
>>> contraction(DYNAMIC, 256)
Fraction(1763311, 1768495)
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import sympy as sp

from theory.algebra import everywhere, identity, nonnegative
from theory.base import Step, Theorem
from theory.codebooks import DYNAMIC, NF4, contraction, worst_case
from theory.t1_measure import check

STATEMENT = r"""
Let $\ell_0<\dots<\ell_K$ be levels in $[-1,1]$ with $0$ among them. A block $x\in\mathbb{R}^B$ is stored as its scale
$\sigma=\max_j|x_j|$ and, for each entry, the level nearest to $x_j/\sigma$; $Q(x)_j=\sigma\,\ell(x_j/\sigma)$ and $Q(0)=0$
(blocks with $\sigma\le10^{-38}$ count as zero). For a gap
$(\ell_i,\ell_{i+1})$ let $m_i$ be its midpoint and $h_i$ its half-width; let $e_s=|s-\ell(s)|<1$ for $s=\pm1$, and $c=B-1$. Then
\[
  \sup_{x\ne0}\frac{\|Q(x)-x\|^2}{\|x\|^2}=1-\alpha=\max_{s=\pm1}\ \max\Bigl(e_s^2,\ \max_i\frac{e_s^2+c\,h_i^2}{1+c\,m_i^2}\Bigr)<1,
\]
attained by $x=(s,m_i,\dots,m_i)$; tensors of many blocks have the same supremum. For NF4,
$\alpha=\bigl(1+\tfrac14(B-1)\ell^2\bigr)^{-1}$ with $\ell=0.09105003625154495$ at $B=64,128,256$; for the signed 8-bit dynamic map and
$B<2660$,
$\alpha=1-\frac{Bh^2}{1+(B-1)m^2}$ with $h=\frac9{1280}$, $m=\frac{73}{640}$, at $B=256$ exactly $\frac{1763311}{1768495}$.

If the thresholds between levels are displaced from the midpoints by at most $\eta$, then $1-\alpha\le\max_s\max\bigl(e_s^2,\max_i
(e_s^2+c(h_i+\eta)^2)/(1+c\max(|m_i|-\eta,0)^2)\bigr)$ whenever the right-hand side is below $1$. If $Q(x)$ is moreover rounded with unit
roundoff $u$, then $\sqrt{1-\alpha'}\le\sqrt{1-\alpha}+u\,(1+\sqrt{1-\alpha})$. Rounding the scales themselves voids the certificate.
"""


def proof() -> list[Step]:
    c, e, d, delta, p, a, b, q, u = sp.symbols("c e d delta p a b q u", nonnegative=True)
    scale, block, ell, v, w = sp.symbols("sigma B ell v w", positive=True)
    x, y, level, t, lam = sp.symbols("x y ell_i t lambda", real=True)
    n1, n2 = sp.symbols("s1 s2", nonnegative=True)
    above = (e**2 + c * d**2) / (1 + c * t**2) + delta  # any lambda at or above the form's
    h, m = sp.Rational(9, 1280), sp.Rational(73, 640)

    def bracket(point: Any) -> Any:
        return (point - level) ** 2 - (1 - q) * point**2  # lambda = 1 - q

    return [
        identity(
            r"With $y=x/\sigma$ the error of an entry is $\sigma^2(y-\ell(y))^2$: the ratio depends on $y\in[-1,1]^B$ only, and some "
            r"$|y_j|=1$.",
            (scale * level - scale * y) ** 2 / (scale * y) ** 2,
            (y - level) ** 2 / y**2,
        ),
        identity(
            r"For $\lambda=1-\alpha$: numerator minus $\lambda$ times denominator is $(e_s^2-\lambda)+\sum_{j\le c}b(y_j)$ with the "
            r"bracket "
            r"$b(y)=(y-\ell(y))^2-\lambda y^2$; the supremum is at most $\lambda$ iff this is never positive (Dinkelbach). For equal "
            r"entries:",
            (e**2 + c * (t - level) ** 2) - lam * (1 + c * t**2),
            (e**2 - lam) + c * ((t - level) ** 2 - lam * t**2),
        ),
        nonnegative(
            r"In a cell, where $\ell(y)=\ell_i$ is constant, the bracket is convex for $\lambda\le1$: for weights $v,w>0$, "
            r"$\frac{v\,b(x)+w\,b(y)}{v+w}-b\bigl(\frac{vx+wy}{v+w}\bigr)=(1-\lambda)\frac{vw(x-y)^2}{(v+w)^2}\ge0$. So its maximum is "
            r"at an end.",
            (v * bracket(x) + w * bracket(y)) / (v + w) - bracket((v * x + w * y) / (v + w)),
            [q * v * w * (x - y) ** 2 / (v + w) ** 2],
        ),
        nonnegative(
            r"An end of a cell is a threshold $t$ at distance $d$ from its level. If $\lambda\ge(e_s^2+cd^2)/(1+ct^2)$, by $\delta\ge0$, "
            r"then "
            r"$(\lambda-e_s^2)-c\,(d^2-\lambda t^2)=\delta(1+ct^2)\ge0$: each of the $c$ brackets is at most $(\lambda-e_s^2)/c$.",
            above - e**2 - c * (d**2 - above * t**2),
            [delta * (1 + c * t**2)],
        ),
        identity(
            r"Attained: for $x=(s,t,\dots,t)$ the numerator is $e_s^2+cd^2$ and the denominator $1+ct^2$, so with $\delta=0$ the "
            r"difference vanishes.",
            (e**2 + c * d**2) - above.subs(delta, 0) * (1 + c * t**2),
            0 * c,
        ),
        nonnegative(
            r"The form is below $1$: as $0$ is a level, $|m_i|=h_i+a$ with $a\ge0$, and for $e_s=1-b$, $0<b\le1$, "
            r"$(1+cm_i^2)-(e_s^2+ch_i^2)=b(2-b)+c\,a(2h_i+a)>0$ (here with $b=1/(1+q)$).",
            (1 + c * (d + a) ** 2) - ((1 - 1 / (1 + q)) ** 2 + c * d**2),
            [(1 / (1 + q)) * ((1 + 2 * q) / (1 + q)), c * a * (2 * d + a)],
            strict=True,
        ),
        nonnegative(
            r"Many blocks: if $N_k\le\lambda D_k$ for each block, the sums satisfy it too: $\lambda(D_1+D_2)-(N_1+N_2)$ is the sum of "
            r"the slacks.",
            lam * (x + y) - ((lam * x - n1) + (lam * y - n2)),
            [n1, n2],
        ),
        identity(
            r"NF4: $\pm1$ are levels, so $e_s=0$; the gap $(-\ell,0)$ has $|m|=h=\ell/2$, and its term gives $\alpha=1/(1+c\ell^2/4)$.",
            1 - (c * (ell / 2) ** 2) / (1 + c * (ell / 2) ** 2),
            1 / (1 + c * ell**2 / 4),
        ),
        everywhere(
            r"NF4: to ten digits, $\alpha=0.8845101952$, $0.7916334077$, $0.6542385526$ at $B=64,128,256$.",
            lambda known: f"{float(1 / (1 + (known[0] - 1) * (NF4[7] - NF4[6]) ** 2 / 4)):.10f}" == known[1],
            ((64, "0.8845101952"), (128, "0.7916334077"), (256, "0.6542385526")),
        ),
        everywhere(
            r"NF4: among its 15 gaps that one has the largest term at $B=64$, $128$ and $256$ (exact rational arithmetic).",
            lambda size: contraction(NF4, size) == 1 / (1 + (size - 1) * (NF4[7] - NF4[6]) ** 2 / 4),
            (64, 128, 256),
        ),
        identity(
            r"8-bit dynamic: at $s=-1$ the nearest level is $-1+h$, so $e_s=h$ and the term of the gap at $m$ is $Bh^2/(1+(B-1)m^2)$.",
            (h**2 + (block - 1) * h**2) / (1 + (block - 1) * m**2),
            block * h**2 / (1 + (block - 1) * m**2),
        ),
        everywhere(
            r"8-bit dynamic: that term is the largest of the 510 for every power of two $B=2,\dots,2048$ and for $B=2659$, no longer for "
            r"$B=2660$.",
            lambda size: (
                (contraction(DYNAMIC, size) == 1 - size * Fraction(81, 1280**2) / (1 + (size - 1) * Fraction(73, 640) ** 2))
                == (size < 2660)
            ),
            (*(2**k for k in range(1, 12)), 2659, 2660),
        ),
        everywhere(
            r"8-bit dynamic, $B=256$: $\alpha=\frac{1763311}{1768495}$ exactly.",
            lambda exact: contraction(DYNAMIC, 256) == exact,
            [Fraction(1763311, 1768495)],
        ),
        nonnegative(
            r"Displaced thresholds: $d\le h_i+\eta$ and $|t|\ge p=\max(|m_i|-\eta,0)$, say $h_i+\eta=d+a$, $|t|=p+b$: "
            r"the safe term is at least the true one, because the cross product of the two fractions is",
            (e**2 + c * (d + a) ** 2) * (1 + c * (p + b) ** 2) - (e**2 + c * d**2) * (1 + c * p**2),
            [e**2 * c * b * (2 * p + b), c * a * (2 * d + a) * (1 + c * p**2), c**2 * (d + a) ** 2 * b * (2 * p + b)],
        ),
        nonnegative(
            r"Rounded output, $\|x\|=1$: $\|R(Q)-x\|\le\|Q-x\|+u\|Q\|$ and $\|Q\|\le1+\|Q-x\|$; with $\|Q-x\|=q-a$ and $\|Q\|=1+q-a-b$, "
            r"$q+u(1+q)-(\|Q-x\|+u\|Q\|)=a+u(a+b)\ge0$.",
            q + u * (1 + q) - ((q - a) + u * (1 + q - a - b)),
            [a, u * (a + b)],
        ),
        everywhere(
            r"Exact enumeration: for the levels $-1,-\frac13,0,\frac14,\frac34$ and $B=2,3$ no block on a grid of step $\frac1{24}$ "
            r"exceeds the "
            r"form, and its maximum over the grid, which holds all midpoints, is the form.",
            _form_is_the_maximum,
            (2, 3),
        ),
    ]


def _form_is_the_maximum(block: int) -> bool:
    levels = tuple(Fraction(n, 12) for n in (-12, -4, 0, 3, 9))
    grid = [Fraction(n, 24) for n in range(-24, 25)]
    error = {y: min((y - level) ** 2 for level in levels) for y in grid}
    found = max(
        (error[s] + sum(error[y] for y in rest)) / (1 + sum(y * y for y in rest))
        for s in (Fraction(-1), Fraction(1))
        for rest in product(grid, repeat=block - 1)
    )
    return found == worst_case(levels, block)[0]


THEOREM = Theorem(
    id="T1",
    title="Block-absmax codebook quantisers",
    statement=STATEMENT,
    source="derived here",
    tight=True,
    modules=("mango.codecs",),
    proof=proof,
    check=check,
)

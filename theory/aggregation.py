"""The constants kappa of mango.feedback.aggregators: proofs for T6, and a search for inputs that come near them.

kappa bounds |x_hat - x_bar|^2 / v over all inputs, f of the n messages hostile: x_bar and v are the mean and variance of the G = n - f
honest ones.
"""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import sympy as sp
import torch
from torch import Tensor

from mango.feedback import aggregators
from mango.feedback.aggregators import Aggregator
from theory.algebra import everywhere, identity, nonnegative
from theory.base import Case, Step


def proof() -> list[Step]:
    j, r, a = sp.symbols("j r a", positive=True)  # |A| = j, G = j + r, mean deviation a of A
    x1, x2 = sp.symbols("x1:3", nonnegative=True)
    f, m = sp.symbols("f m", positive=True)  # G = f + m, n = 2f + m
    dist, far = sp.symbols("dist far", nonnegative=True)  # |z - x_bar|; mean of |x_i - x_bar| over the honest
    hostile = sp.Symbol("hostile", nonnegative=True)  # sum over the attackers of |x_i - x_bar|
    v, ka, kb = sp.symbols("v kappa_a kappa_b", nonnegative=True)
    return [
        nonnegative(
            r"(3) If the mean of $j$ of $G$ real numbers deviates from the mean of all by $a$, then $a^2\le\frac{G-j}jv$, $v$ their "
            r"variance: the other "
            r"$G-j$ deviate by $-\frac{ja}{G-j}$ in the mean, so $Gv\ge ja^2+(G-j)\bigl(\frac{ja}{G-j}\bigr)^2$ (Jensen in each part).",
            r / j * ((j * a**2 + r * (j * a / r) ** 2 + x1) / (j + r)) - a**2,
            [r / j * x1 / (j + r)],
        ),
        everywhere(
            r"(3) Of $n$ numbers, $\nu$ hostile, the $k$-th smallest $x_{(k)}$ obeys $y_{(k-\nu)}\le x_{(k)}\le y_{(k)}$ for $\nu<k\le "
            r"n-\nu$, "
            r"$y$ the honest "
            r"ones in order: at least $k$ numbers are $\le y_{(k)}$, and at most $k-1$ are $<y_{(k-\nu)}$. (Checked for all inputs in "
            r"$\{0,1,2\}^n$, $n\le6$.)",
            _bracketed,
            [(values, f) for n in range(1, 7) for f in range((n + 1) // 2) for values in product(range(3), repeat=n)],
        ),
        identity(
            r"(3) So the mean of the values kept after trimming $b\ge\nu$ at each end lies, per coordinate, between the means of the "
            r"honest values of ranks "
            r"$b-\nu+1,\dots,n-b-\nu$ and $b+1,\dots,n-b$; together with all honest values beyond them these are $j=G-b$ values whose mean "
            r"deviates at least as "
            r"far, and $\kappa=\frac{G-j}j=\frac b{G-b}$: $\frac\nu{n-2\nu}$ for the trimmed mean ($b=\nu$), and $b=\lceil n/2\rceil-1$ "
            r"for "
            r"the median.",
            ((f + m) - m) / m,
            f / ((2 * f + m) - 2 * f),
        ),
        nonnegative(
            r"(3) Geometric median $z$: $\sum_i\|x_i-z\|\le\sum_i\|x_i-\bar x\|$ and the triangle inequality give "
            r"$G\|z-\bar x\|-\sum_{\text{good}}+\sum_{\text{bad}}-\nu\|z-\bar x\|\le\sum_{\text{good}}+\sum_{\text{bad}}$ of $\|x_i-\bar "
            r"x\|$, so "
            r"$(G-\nu)\|z-\bar x\|\le2\sum_{\text{good}}\|x_i-\bar x\|\le2G\sqrt v$ and $\kappa=\frac{4G^2}{(G-\nu)^2}$.",
            2 * (f + m) * far
            - (sp.solve((f + m) * dist - (f + m) * far + hostile - f * dist + x1 - ((f + m) * far + hostile), dist)[0]) * m,
            [x1],
        ),
        nonnegative(
            r"(3) Krum: an honest score is at most $\sum_{l\,\text{good}}\|x_i-x_l\|^2$, whose mean over the good is $2Gv$; so the chosen "
            r"$x$ has at least "
            r"$m=n-2\nu$ good among its $n-\nu$ nearest, $H$, with $\sum_H\|x-x_l\|^2\le2Gv$, hence $\|x-\bar x_H\|^2\le\frac{2G}mv$ "
            r"(Jensen), and "
            r"$\|\bar x_H-\bar x\|^2\le\frac\nu mv$ (first step): $\kappa=(\sqrt{2G/m}+\sqrt{\nu/m})^2$. Here: $\|u+w\|\le\|u\|+\|w\|$ "
            r"squared.",
            (sp.sqrt(ka) + sp.sqrt(kb)) ** 2 * v - (ka * v + kb * v + 2 * sp.sqrt(ka * kb) * v - x1),
            [x1],
        ),
        identity(
            r"(3) where $\frac1G\sum_{i,l\,\text{good}}\|x_i-x_l\|^2=2Gv$ (in $S_1=\sum x_i$, $S_2=\sum\|x_i\|^2$).",
            (2 * m * x2 - 2 * x1**2) / m,
            2 * m * (x2 / m - (x1 / m) ** 2),
        ),
        nonnegative(
            r"(3) Clipping from the median $z$ at the median distance $\tau$: $\|\hat x-z\|\le\tau$, and at least $h=n-\lceil "
            r"n/2\rceil+1-\nu$ good "
            r"messages are at distance $\ge\tau$ from $z$, so $h\tau^2\le\sum_{\text{good}}\|x_i-z\|^2=G(v+\|z-\bar x\|^2)\le "
            r"G(1+\kappa_z)v$: "
            r"$\kappa=\bigl(\sqrt{\kappa_z}+\sqrt{G(1+\kappa_z)/h}\bigr)^2$.",
            m * (1 + ka) * v - (m * (v + ka * v - x1) - x2),
            [m * x1, x2],
        ),
        everywhere(
            r"(3) Buckets: the mean of $s$ of $G$ vectors drawn without replacement has $\mathbb E\|\bar x_s-\bar x\|^2=\frac "
            r"vs\frac{G-s}{G-1}$ (enumerated "
            r"for all $s\le G\le6$). At least $n/s-\nu$ buckets are free of attackers; $M=s(n/s-\nu)$ good messages in them are a uniform "
            r"choice, so with $\kappa'$ "
            r"of the aggregator on $n/s$ buckets, $\mathbb E\|\hat x-\bar "
            r"x\|^2\le\Bigl(\sqrt{\frac{\kappa'}s\frac{G-s}{G-1}}+\sqrt{\frac{G-M}{M(G-1)}}\Bigr)^2v$.",
            _without_replacement,
            [(s, G) for G in range(2, 7) for s in range(1, G + 1)],
        ),
        identity(
            r"(3) $\sigma^2=\frac1{G(G-1)}\sum_{i\ne l}\|x_i-x_l\|^2=\frac{2G}{G-1}v$, so $c\delta=\frac{G-1}{2G}\kappa$.",
            (2 * m * x2 - 2 * x1**2) / (m * (m - 1)),
            2 * m / (m - 1) * (x2 / m - (x1 / m) ** 2),
        ),
    ]


def _bracketed(case: tuple[tuple[int, ...], int]) -> bool:
    values, f = case  # the last f are hostile: every order of values occurs among the cases
    n = len(values)
    ordered, honest = sorted(values), sorted(values[: n - f])
    return all(honest[k - f - 1] <= ordered[k - 1] <= honest[k - 1] for k in range(f + 1, n - f + 1))


def _without_replacement(case: tuple[int, int]) -> bool:
    s, G = case
    values = [sp.Integer(i**2 - 3 * i) for i in range(G)]
    mean = sum(values) / G
    v = sum((value - mean) ** 2 for value in values) / G
    spread = sum((sum(chosen) / sp.Integer(s) - mean) ** 2 for chosen in combinations(values, s)) / comb(G, s)
    return bool(spread == v / s * sp.Rational(G - s, G - 1))


def measure(seed: int) -> list[Case]:
    """The largest |x_hat - x_bar|^2 / v that random, clustered and constructed inputs reach, beside kappa; 8 workers, 2 hostile."""
    generator = torch.Generator().manual_seed(seed)
    n, f = 8, 2
    inputs = [*_constructed(n, f), *(_random(n, f, generator) for _ in range(200))]
    cases = []
    for name in aggregators.REGISTRY:
        aggregator: Aggregator = aggregators.get(name, delta=f / n)
        kappa = aggregator.kappa(n, f)
        if not aggregator.robust or kappa is None:
            continue
        measured = max(_ratio(aggregator, rows, n - f) for rows in inputs)
        cases.append(Case(f"kappa of {name}, 8 workers, 2 hostile", kappa, measured, 1e-9))
    return cases


def _ratio(aggregator: Aggregator, rows: Tensor, good: int) -> float:
    mean = rows[:good].mean(0)
    v = (rows[:good] - mean).square().sum(1).mean()
    return float((aggregator(rows) - mean).square().sum() / v)


def _constructed(n: int, f: int) -> list[Tensor]:
    """Some honest messages apart from the others, the attackers with either group or far away."""
    good = n - f
    rows = []
    for apart, place in product(range(1, good), (-1e6, -1.0, 0.0, 0.5, 1e6)):
        values = torch.zeros(n, 1, dtype=torch.float64)
        values[:apart] = -1.0
        values[good:] = place
        rows.append(values)
    return rows


def _random(n: int, f: int, generator: torch.Generator) -> Tensor:
    """Heavy-tailed honest messages in 1 to 4 dimensions, attackers at a common point at a random distance."""
    dim = int(torch.randint(1, 5, (), generator=generator))
    rows = torch.randn(n, dim, generator=generator, dtype=torch.float64) ** 3
    distance = 10 ** (4 * torch.rand((), generator=generator, dtype=torch.float64) - 2)
    rows[n - f :] = torch.randn(dim, generator=generator, dtype=torch.float64) * distance
    return rows

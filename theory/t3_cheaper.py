"""T3's claims on steps that cost less than a whole power step, half steps and sampled ones: the steps of their proof and measurements."""

from __future__ import annotations

import sympy as sp
import torch
from torch import Tensor

from mango import subspace
from theory.algebra import identity, letters, nonnegative, words
from theory.base import Case, Step


def half_step() -> list[Step]:
    left, last, d, j, n = sp.symbols("i l d j n", positive=True)
    weights, values = sp.symbols("w1:4", nonnegative=True), sp.symbols("lambda1:4", nonnegative=True)
    pairs = [(a, b) for a in range(3) for b in range(a)]
    moments = [sum(w * value**power for w, value in zip(weights, values, strict=True)) for power in range(3)]
    return [
        identity(
            r"Half step. Let $G'$ be what the columns of $G^\top Y$ leave of $G$, $d=\operatorname{rank}G'\le n$, $\lambda_i$ the nonzero "
            r"eigenvalues of $G'G'^\top$ and $w_i$ the squares of $Z$'s first column in its eigenbasis. That column adds "
            r"$\|G'G'^\top z\|^2/\|G'^\top z\|^2=\sum\lambda_i^2w_i/\sum\lambda_iw_i\ge\sum\lambda_iw_i/\sum w_i$, by Lagrange's identity "
            r"(three terms; the general one is the sum over pairs).",
            moments[2] * moments[0] - moments[1] ** 2,
            sum(weights[a] * weights[b] * (values[a] - values[b]) ** 2 for a, b in pairs),
        ),
        identity(
            r"The $w_i/\sum w$ are exchangeable and sum to 1, so each has mean $1/d$: the column adds $\|G'\|^2/d$ in the mean, leaving a "
            r"matrix of rank $d-1$. After $i$ columns $1-\frac id$ is left, and one more leaves",
            (1 - left / d) * (1 - 1 / (d - left)),
            1 - (left + 1) / d,
        ),
        nonnegative(
            r"so that after all, with $n=d+l$, $(1-\frac jn)-(1-\frac jd)=\frac{jl}{d(d+l)}\ge0$: the bound holds whatever $Y$ is.",
            (1 - j / n).subs(n, d + last) - (1 - j / d),
            [j * last / (d * (d + last))],
        ),
    ]


def sampled() -> list[Step]:
    one, other, hit, rest, share, alpha, gain, both = sp.symbols("a b c d p alpha epsilon delta", nonnegative=True)
    trace, kept = sp.symbols("t u", nonnegative=True)
    g, gt, v, vt, s, st, damp = letters("G Gt V Vt S St D")
    return [
        identity(
            r"A sample. Squares of rows add, whatever $Q$ is (two rows $a,b$ of $G$, two columns of $Q$):",
            sum(entry**2 for entry in sp.Matrix(2, 2, sp.symbols("a_1 b_1 a_2 b_2"))),
            sum(entry**2 for name in ("a", "b") for entry in sp.symbols(f"{name}_1 {name}_2")),
        ),
        nonnegative(
            r"so that $\|GQ\|^2=\|G_JQ\|^2+d$ with $d\ge0$ from the rows that were not seen. As $\|G_JQ\|^2=\alpha\|G_J\|^2+\varepsilon$ "
            r"in the mean over the scouts, with $\varepsilon\ge0$ by the above for the matrix $G_J$ ($c=\|G_J\|^2$),",
            (alpha * hit + gain + rest) - alpha * hit,
            [gain, rest],
        ),
        identity(
            r"and a row that is in $J$ with probability $p$ counts $p$ times in the mean of $\|G_J\|^2$ (two rows, of squared norms $a,b$, "
            r"drawn with any correlation: both with probability $\delta$, either alone with $p-\delta$).",
            both * (one + other) + (share - both) * one + (share - both) * other,
            share * (one + other),
        ),
        identity(
            r"A damped step is a power step on $B$, which has the rows of $D^{1/2}V^\top$ below those of $G$. Of the former $[V,S]$ keeps "
            r"all, $\|D^{1/2}V^\top[V,S]\|^2=\operatorname{tr}D$, because, with $\Pi=VV^\top+SS^\top$, "
            r"$(G^\top G+VDV^\top)\Pi=G^\top G\,\Pi+VDV^\top$,",
            words((gt * g + v * damp * vt) * (v * vt + s * st), {vt * v: 1, vt * s: 0}),
            gt * g * (v * vt + s * st) + v * damp * vt,
        ),
        nonnegative(
            r"and an orthonormal $Q$ no more, $\|D^{1/2}V^\top Q\|^2=t-d$ with $t=\operatorname{tr}D$, $d\ge0$. The step loses nothing "
            r"of $B$ (T2): $\|GQ\|^2+t-d=\|G[V,S]\|^2+t+\varepsilon$ with $\varepsilon\ge0$. So of $G$ it keeps no less "
            r"($u=\|G[V,S]\|^2$).",
            (kept + trace + gain - (trace - rest)) - kept,
            [gain, rest],
        ),
    ]


def half_step_cases(seed: int, dim: int = 12, draws: int = 4096) -> list[Case]:
    """``mango.subspace.half_step``: its worst case, which a flat spectrum attains, and starts that are blind to G or made from it."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    flat = torch.zeros(dim, 20, dtype=torch.float64)
    flat[:, :dim] = torch.linalg.qr(gaussian(dim, dim)).Q
    steep = flat * 0.5 ** torch.arange(20)
    blind = torch.zeros(draws, 2, 20, dtype=torch.float64)
    blind[..., dim:] = gaussian(draws, 2, 20 - dim)  # G maps it to zero
    cases = []
    for label, g, others in (("flat", flat, blind), ("steep", steep, blind), ("steep, momentum", steep, gaussian(draws, 2, dim) @ steep)):
        left = _left_by_half_step(g, torch.cat([others, gaussian(draws, 2, 20)], dim=-2))
        cases.append(Case(f"half step, n={dim}, k=4, j=2: {label}", 1.0 - 2 / dim, float(left.mean())))
    left = _left_by_half_step(flat, gaussian(draws, 2, 20))
    cases.append(Case(f"half step, n={dim}, k=j=2: flat, constructed", 1.0 - 2 / dim, float(left.max()), rounding=1e-12, within=1e-9))
    return cases


def sampled_cases(seed: int, dim: int = 12, draws: int = 4096, parts: int = 4) -> list[Case]:
    """``mango.subspace.power_step`` on one of four parts of the columns: its worst case is a matrix that lies in one of them."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    axes = torch.linalg.qr(gaussian(dim, dim)).Q
    kept, last, hidden = axes[:, :3], axes[:, 3:4], axes[:, 4:]
    faint, none = 1e-3 * kept, torch.zeros(dim, 9, dtype=torch.float64)  # what the basis holds is seen again, so it is not replaced
    astray = torch.cat([faint, 1e-3 * last, none[:, :8]], dim=-1)  # the other parts have nothing else for a scout
    apart = torch.cat([hidden, faint, none[:, :1], *[astray] * (parts - 1)], dim=-1)
    steep = gaussian(dim, 12 * parts) * 0.7 ** torch.arange(12 * parts)
    start = torch.cat([kept, torch.zeros_like(last)], dim=-1).expand(draws, -1, -1)  # the last column is the scout's
    cases = []
    for label, g, alternate, damping in (
        ("in one part", apart, False, 0.0),
        ("in one part, damped", apart, False, parts - 1.0),
        ("steep", steep, False, 0.0),
        ("steep, alternate columns, damped", steep, True, parts - 1.0),
    ):
        left = []
        for part in [g[:, i::parts] for i in range(parts)] if alternate else g.split(12, dim=-1):
            basis, _ = subspace.power_step(start, part.expand(draws, -1, -1), gaussian(draws, dim, 1), damping)
            left.append(float(_left(g, basis).mean()))
        cases.append(Case(f"sampled, n={dim}, k=4, j=1: {label}", 1.0 - 1 / 9 / parts, sum(left) / parts))
    begin = torch.linalg.qr(gaussian(draws, dim, 4)).Q
    for damping in (0.5, parts - 1.0, 30.0):
        after = 1.0 - _left(steep, subspace.power_step(begin, steep.expand(draws, -1, -1), damping=damping)[0])
        share = float(((1.0 - _left(steep, begin)) / after).max())
        cases.append(Case(f"damped, n={dim}, k=4: captured before / after, d={damping:g}", 1.0, share, rounding=1e-12))
    return cases


def _left_by_half_step(g: Tensor, start: Tensor) -> Tensor:
    """Relative error of the basis of each draw, (draws,)."""
    return _left(g, subspace.half_step(g.expand(len(start), *g.shape), start))


def _left(g: Tensor, basis: Tensor) -> Tensor:
    return (g - basis @ (basis.mT @ g)).square().sum((-2, -1)) / g.square().sum()

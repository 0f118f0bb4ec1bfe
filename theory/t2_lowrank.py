r"""T2: what a low-rank approximation keeps, by SVD, by a random basis, by a power step.

Problem: approximate a matrix G by its part in an r-dimensional subspace.
Algorithm: ``mango.compressors.LowRank`` (truncated SVD, fresh Haar basis, power step) and ``mango.Subspace`` (warm-started power step).
Guarantee (derived here; the SVD's optimality is eckart1936approximation, the warm step is vogels2019powersgd): SVD alpha = r / min(m, n), a
Haar basis k / n in expectation, both exact; a power step is never worse than the basis that it starts from; a warm start alone has no
positive alpha. Tight: a flat spectrum reaches the SVD's constant.

>>> from theory.t2_lowrank import stuck
>>> g, basis, ratio = stuck(6, 5, 2, 0.01)
>>> print(g.shape, basis.shape, round(ratio, 4))
torch.Size([6, 5]) torch.Size([6, 2]) 0.9998
"""

from __future__ import annotations

from itertools import permutations, product

import sympy as sp
import torch
from torch import Tensor

from mango import Subspace, compressors
from mango.draws import gaussian
from mango.orthonormal import orthonormalize
from theory import search
from theory.algebra import everywhere, identity, letters, nonnegative, transpose, words
from theory.base import Case, Check, Step, Theorem

STATEMENT = r"""
Let $G\in\mathbb{R}^{m\times n}$ and norms be Frobenius norms.
\begin{enumerate}
\item For $V\in\mathbb{R}^{n\times k}$ with $V^\top V=I$: $\|G-GVV^\top\|^2=\|G\|^2-\|GV\|^2$.
\item The truncated SVD $C(G)$ of rank $r\le p=\min(m,n)$ has $\|G-C(G)\|^2\le(1-\tfrac rp)\|G\|^2$, with equality for a flat spectrum.
\item For $V$ Haar-distributed on the orthonormal $n\times k$ matrices, independent of $G$: $\mathbb{E}\|G-GVV^\top\|^2=(1-\tfrac
kn)\|G\|^2$.
\item For every $V$ (any columns) and any orthonormal $P$ whose span contains that of $GV$: $\|G-PP^\top G\|\le\|G-GVV^\top\|$. One power
step
      from a basis inherits whatever is guaranteed for that basis.
\item A warm-started power step has no positive worst-case $\alpha$: for $V_0$ with columns $v_1,\dots,v_k$, a unit $w\perp v_i$,
orthonormal
      $e,u_1,\dots,u_k$ and $G=ew^\top+\varepsilon\sum_iu_iv_i^\top$, the step from $V_0$ leaves the relative squared error
      $1/(1+k\varepsilon^2)$, which tends to $1$; at $\varepsilon\to0$ the basis stays where it is for ever.
\end{enumerate}
"""

ROUNDING = 1e-5  # float32 products and factorisations of the sizes used here


def isotropic(n: int) -> bool:
    """The mean of R M Rᵀ over the signed permutations R of n coordinates is tr(M)/n I, for symbolic symmetric M, by enumeration."""
    m = sp.Matrix(n, n, lambda i, j: sp.Symbol(f"m{min(i, j)}{max(i, j)}"))
    total, count = sp.zeros(n, n), 0
    for order in permutations(range(n)):
        for signs in product((1, -1), repeat=n):
            r = sp.Matrix(n, n, lambda i, j, order=order, signs=signs: signs[i] if order[i] == j else 0)
            total, count = total + r * m * r.T, count + 1
    return sp.expand(total / count - sp.eye(n) * m.trace() / n) == sp.zeros(n, n)


def proof() -> list[Step]:
    g, gt, v, vt, p, x, xt = letters("G Gt V Vt P X Xt")
    pairs = {g: gt, v: vt, p: p, x: xt}
    orthonormal = {vt * v: 1}
    projector = {p**2: p, p * x: x, xt * p: xt}  # P here stands for the projector P Pᵀ; X = P Pᵀ X
    residual = g - g * v * vt
    best, other = g - p * g, g - x
    gap = p * g - x

    def gram(word: sp.Expr) -> sp.Expr:
        return transpose(word, pairs) * word

    a, b, size, rank = sp.symbols("a b p r", positive=True)
    drops = sp.symbols("d1:7", nonnegative=True)
    eps, k = sp.symbols("epsilon k", positive=True)
    n = sp.Symbol("n", positive=True)
    matrix, start, basis = _stuck_symbolic(eps)
    return [
        identity(
            r"(1) $(G-GVV^\top)(G-GVV^\top)^\top=GG^\top-GV(GV)^\top$ when $V^\top V=I$, in the free algebra, hence for every size; take "
            r"traces.",
            words(residual * transpose(residual, pairs), orthonormal),
            words(g * gt - (g * v) * transpose(g * v, pairs), orthonormal),
        ),
        identity(
            r"(2) By Eckart and Young the error is the sum $b$ of the $p-r$ smallest $\sigma_i^2$; with $a$ the sum of the $r$ largest, "
            r"$(1-\frac rp)(a+b)-b=\frac1p\bigl((p-r)a-rb\bigr)$.",
            (1 - rank / size) * (a + b) - b,
            ((size - rank) * a - rank * b) / size,
        ),
        everywhere(
            r"(2) $(p-r)a-rb=\sum_{i\le r<j}(\sigma_i^2-\sigma_j^2)\ge0$: written in the decrements $d_l=\sigma_l^2-\sigma_{l+1}^2\ge0$ "
            r"all "
            r"coefficients are non-negative, and only $d_p$'s vanishes, which is the flat spectrum (each $r<p\le6$).",
            lambda sizes: _flat_is_worst(drops, *sizes),
            [(r, p_) for p_ in range(2, 7) for r in range(1, p_)],
        ),
        everywhere(
            r"(3) $VV^\top$ has the law of $RVV^\top R^\top$ for every orthogonal $R$, signed permutations among them; their mean turns "
            r"any "
            r"symmetric $M$ into $\frac{\operatorname{tr}M}nI$ (all $2^nn!$ of them, symbolic $M$, $n=2,3,4$).",
            isotropic,
            (2, 3, 4),
        ),
        identity(
            r"(3) So $\mathbb{E}VV^\top=\frac knI$, as $\operatorname{tr}VV^\top=k$, and with (1) "
            r"$\mathbb{E}\|G-GVV^\top\|^2=\|G\|^2-\frac kn\|G\|^2$.",
            words((g * gt - g * v * vt * gt).subs(v * vt, k / n), {}),
            (1 - k / n) * g * gt,
        ),
        identity(
            r"(4) With $\Pi=PP^\top$ and any $X=\Pi X$, such as $X=GVV^\top$: $(G-X)^\top(G-X)=(G-\Pi G)^\top(G-\Pi G)+(\Pi "
            r"G-X)^\top(\Pi G-X)$ in "
            r"the free algebra; traces give $\|G-X\|^2-\|G-\Pi G\|^2=\|\Pi G-X\|^2\ge0$.",
            words(gram(other), projector),
            words(gram(best) + gram(gap), projector),
        ),
        identity(
            r"(5) For $m=n=4$, $k=2$: the step from $V_0$ gives the basis $(u_1,u_2)$ of the range of $GV_0$, which "
            r"$GV_0=\varepsilon(u_1,u_2)$ shows,",
            matrix * start - eps * basis,
            sp.zeros(4, 2),
        ),
        identity(
            r"(5) and leaves $\|G-PP^\top G\|^2=1$ of $\|G\|^2=1+k\varepsilon^2$,",
            ((matrix - basis * basis.T * matrix).T * (matrix - basis * basis.T * matrix)).trace() / (matrix.T * matrix).trace(),
            1 / (1 + 2 * eps**2),
        ),
        nonnegative(
            r"(5) whose distance from $1$, $k\varepsilon^2/(1+k\varepsilon^2)$, is below any $\alpha>0$ once $k\varepsilon^2<\alpha$: "
            r"$\alpha-\frac{k\varepsilon^2}{1+k\varepsilon^2}>0$ for $\alpha=k\varepsilon^2+b$.",
            (k * eps**2 + b) - k * eps**2 / (1 + k * eps**2),
            [b, k**2 * eps**4 / (1 + k * eps**2)],
            strict=True,
        ),
    ]


def _flat_is_worst(drops: tuple[sp.Symbol, ...], r: int, p: int) -> bool:
    squares = [sum(drops[i:p]) for i in range(p)]  # sigma_i^2, falling
    excess = sp.Poly(sp.expand((p - r) * sum(squares[:r]) - r * sum(squares[r:])), *drops[:p])
    double = sum(squares[i] - squares[j] for i in range(r) for j in range(r, p))
    signs = [excess.coeff_monomial(drop) for drop in drops[:p]]
    return sp.expand(excess.as_expr() - double) == 0 and all(sign > 0 for sign in signs[:-1]) and signs[-1] == 0


def _stuck_symbolic(eps: sp.Symbol) -> tuple[sp.Matrix, sp.Matrix, sp.Matrix]:
    """G, V0 and (u1, u2) in tilted rational coordinates, k = 2, m = n = 4."""
    u = sp.Matrix([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2  # orthogonal: rows and columns
    v = sp.Matrix([[3, -4, 0, 0], [4, 3, 0, 0], [0, 0, 5, -12], [0, 0, 12, 5]])
    v = sp.Matrix.hstack(v[:, :2] / 5, v[:, 2:] / 13)
    return u[:, 0] * v[:, 3].T + eps * (u[:, 1] * v[:, 0].T + u[:, 2] * v[:, 1].T), v[:, :2], u[:, 1:3]


def stuck(rows: int, columns: int, rank: int, epsilon: float, seed: int = 0, hidden: int = 1) -> tuple[Tensor, Tensor, float]:
    """The construction of (5) for a left basis, as ``Subspace`` keeps it, with ``hidden`` directions of size 1 that V0 does not see.

    Returns G (rows, columns), V0 (rows, rank) and the relative squared error that a step from V0 leaves, all in float64.
    """
    left = orthonormalize(gaussian((rows, rank + hidden), (seed, 1), dtype=torch.float64))
    right = orthonormalize(gaussian((columns, rank + hidden), (seed, 2), dtype=torch.float64))
    sizes = torch.cat([torch.ones(hidden, dtype=torch.float64), torch.full((rank,), epsilon, dtype=torch.float64)])
    return (left * sizes) @ right.T, left[:, hidden:], hidden / (hidden + rank * epsilon**2)


def operator(compressor: compressors.Compressor, rows: int, columns: int) -> search.RoundTrip:
    """Acts on flattened matrices: (n, rows * columns) -> the same shape."""
    return lambda x: torch.stack([compressor(matrix).reshape(-1) for matrix in x.view(-1, rows, columns)])


def check(seed: int) -> Check:
    cases: list[Case] = []
    found = search.attack(
        operator(compressors.LowRank(rank=2, method="svd"), 4, 6),
        gaussian((24, 24), (seed, 3)),
        orthonormalize(gaussian((6, 4), (seed, 4))).T.reshape(1, 24),
        seed,
        steps=100,
        first=(0.05, 0.5),
        generations=100,
    )
    for attack, measured in vars(found).items():
        cases.append(
            Case(f"SVD, rank 2 of 4 x 6: {attack}", 0.5, measured, rounding=ROUNDING, within=1e-3 if attack != "evolution" else None)
        )
    for rank, dim in ((1, 8), (3, 8), (8, 32)):
        flat = orthonormalize(gaussian((dim + 3, dim), (seed, rank, dim))).T.reshape(1, -1)
        worst = search.ratios(operator(compressors.LowRank(rank=rank, method="svd"), dim, dim + 3), flat)
        cases.append(
            Case(f"SVD, rank {rank} of {dim}: flat spectrum", 1.0 - rank / dim, float(worst[0]), rounding=ROUNDING, within=ROUNDING)
        )
        lone = torch.zeros(1024, dim, dim + 3)
        lone[:, 0, 0] = 1.0  # the matrix whose captured share varies most
        samples = search.ratios(operator(compressors.LowRank(rank=rank, method="haar", seed=seed), dim, dim + 3), lone.view(1024, -1))
        sigmas = float((samples.mean() - (1.0 - rank / dim)).abs() / (samples.std() / len(samples) ** 0.5))
        cases.append(Case(f"Haar basis, rank {rank} of {dim}: standard errors from 1 - k/n", 5.0, sigmas))
    cases.append(Case("power step of mango.Subspace: error over that of the basis before it", 1.0, _inherited(seed), rounding=1e-9))
    data: dict[str, object] = {"attacks": vars(found), "stuck": []}
    for epsilon in (0.3, 0.1, 0.03, 0.01):
        g, basis, expected = stuck(40, 32, 4, epsilon, seed)
        error = step_error(g, basis)
        cases.append(Case(f"warm step, epsilon={epsilon}: error of the construction", expected, error, rounding=1e-9, within=1e-9))
        data["stuck"].append({"epsilon": epsilon, "error": error, "formula": expected})  # type: ignore[attr-defined]
    g, basis, _ = stuck(40, 32, 4, 0.01, seed)
    return Check(tuple(cases), Case("warm step held to the SVD's 1 - r/min(m, n)", 1.0 - 4 / 32, step_error(g, basis)), data)


def step_error(g: Tensor, basis: Tensor) -> float:
    """Relative squared error that mango's warm-started step without scouts leaves, from the basis V (rows, k)."""
    space = Subspace(basis.shape[0], basis.shape[1], scouts=0, dtype=torch.float64)
    space.load_state_dict(space.state_dict() | {"basis": basis, "previous": basis})
    space.step(g)
    return float(1.0 - space.energy(g))


def _inherited(seed: int) -> float:
    """Largest error of the step over that of its basis, over spectra from flat to steep; a flat one gives exactly 1."""
    worst = 0.0
    for trial in range(32):
        left = orthonormalize(gaussian((12, 12), (seed, 5, trial), dtype=torch.float64))
        right = orthonormalize(gaussian((15, 12), (seed, 6, trial), dtype=torch.float64))
        sizes = torch.arange(1, 13, dtype=torch.float64) ** -(trial / 8)
        g = (left * sizes) @ right.T
        basis = orthonormalize(gaussian((12, 3), (seed, 7, trial), dtype=torch.float64))
        before = float(1.0 - (basis.T @ g).square().sum() / g.square().sum())
        worst = max(worst, step_error(g, basis) / before)
    return worst


THEOREM = Theorem(
    id="T2",
    title="Low-rank approximation",
    statement=STATEMENT,
    source="eckart1936approximation for the SVD's optimality, vogels2019powersgd for the warm step; constants derived here",
    tight=True,
    modules=("mango.compressors.lowrank", "mango.subspace"),
    proof=proof,
    check=check,
    distance=1e-5,
)

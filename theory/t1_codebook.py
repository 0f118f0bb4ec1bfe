r"""T1: the exact worst case of a block-absmax codebook quantiser (NF4, FP4, 8-bit dynamic).

Problem: how much of a tensor's energy can storing it in few bits destroy, whatever the tensor?
Algorithm: ``mango.codecs`` nf4, fp4, int8: each block of B values is divided by its absmax and rounded to the nearest level of a codebook.
Guarantee (derived here): a closed form, the maximum over the codebook's gaps. Tight: the constructed block reaches it, and gradient ascent
and evolution, which do not know it, come within 0.1 % of it. int8 rounds through a table of 65 536 entries as bitsandbytes' CPU kernel
does: the form then holds with the displaced thresholds, and a safe bound needs the displacement only.

>>> from theory.t1_codebook import NF4, contraction
>>> print(f"{float(contraction(NF4, 64)):.10f} {float(contraction(NF4, 128)):.10f} {float(contraction(NF4, 256)):.10f}")
0.8845101952 0.7916334077 0.6542385526
>>> from theory.t1_codebook import DYNAMIC
>>> contraction(DYNAMIC, 256)
Fraction(1763311, 1768495)
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product
from math import sqrt
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from mango import codecs
from mango.codecs import Codec
from theory import search
from theory.algebra import everywhere, identity, nonnegative
from theory.base import Case, Check, Step, Theorem

# The published codebooks, kept apart from mango's own so that a slip in either shows. NF4: dettmers2023qlora, appendix E (float32 values);
# FP4 and the signed dynamic map (7 exponent positions, no -1): dettmers2022optimizers and bitsandbytes, here in exact decimals.
NF4 = tuple(
    Fraction(level)
    for level in (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
)
FP4 = tuple(sorted({sign * Fraction(n, 192) for sign in (1, -1) for n in (0, 1, 32, 48, 64, 96, 128, 192)}))
DYNAMIC = tuple(
    sorted(
        {Fraction(0), Fraction(1)}
        | {
            sign * Fraction(10) ** (decade - 6) * (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * k + 1, 2 * 2**decade))
            for sign, decade in product((1, -1), range(7))
            for k in range(2**decade)
        }
    )
)
TABLE = Fraction(1, 65535)  # half a cell of the CPU table, in units of absmax
ROUNDING = 1e-6  # of the measurement: float32 scales, quotients and products
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

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


def worst_case(levels: Sequence[Any], block: int, displacement: Any = 0) -> tuple[Any, Any, Any]:
    """1 - alpha by the form, with the sign s and the midpoint m of a worst block (s, m, ..., m); exact for rational levels.

    With ``displacement`` eta > 0: the safe bound for thresholds that are off by at most eta.
    """
    c, candidates = block - 1, []
    for s in (1, -1):
        e = min(abs(s - level) for level in levels)
        candidates.append((e * e, s, 0 * e))
        for low, high in pairwise(levels):
            m, h = (low + high) / 2, (high - low) / 2
            near = max(abs(m) - displacement, 0 * m)
            candidates.append(((e * e + c * (h + displacement) ** 2) / (1 + c * near * near), s, m))
    return max(candidates, key=lambda candidate: candidate[0])


def contraction(levels: Sequence[Any], block: int) -> Any:
    """alpha by the form."""
    return 1 - worst_case(levels, block)[0]


def inexact(error: float, unit: float) -> float:
    """1 - alpha' of an operator with 1 - alpha = error whose output is rounded with this unit roundoff."""
    return (sqrt(error) + unit * (1.0 + sqrt(error))) ** 2


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


def round_trip(codec: Codec) -> search.RoundTrip:
    """Rows of one block each: (n, B) -> (n, B)."""
    return lambda x: codec.decode(codec.encode(x))


def probe(codec: Codec) -> tuple[list[float], list[float]]:
    """The levels that the real codec reaches and the thresholds between them, found from outside by bisection, in units of absmax."""

    def decoded(y: Tensor) -> Tensor:  # (k,) values in [-1, 1] -> (k,) levels
        padded = torch.nn.functional.pad(y, (0, -len(y) % (codec.block - 1))).view(-1, codec.block - 1)
        return round_trip(codec)(torch.cat([torch.ones(len(padded), 1), padded], dim=1))[:, 1:].reshape(-1)[: len(y)]

    fine = 10.0 ** torch.linspace(-8, 0, 4000)
    grid = torch.cat([torch.linspace(-1, 1, 40001), fine, -fine]).sort().values
    values = decoded(grid)
    steps = (values[1:] != values[:-1]).nonzero().squeeze(1)
    low, high = grid[steps], grid[steps + 1]  # the level changes between them
    below, above = values[steps], values[steps + 1]
    for _ in range(40):
        middle = (low + high) / 2
        same = decoded(middle) == below
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return [*below.tolist(), above[-1].item()], ((low + high) / 2).tolist()


def displaced_worst_case(levels: Sequence[float], thresholds: Sequence[float], block: int) -> float:
    """The form with each gap's own threshold t in place of its midpoint: exact for any rounding whose cells are intervals."""
    c, worst = block - 1, 0.0
    for e in (1.0 - levels[-1], levels[0] + 1.0):
        for low, high, t in zip(levels, levels[1:], thresholds, strict=False):
            worst = max(worst, (e * e + c * max(t - low, high - t) ** 2) / (1 + c * t * t), e * e)
    return worst


def constructed(levels: Sequence[Fraction], thresholds: Sequence[float], block: int, near: float) -> Tensor:
    """The proof's worst block (s, m, ..., m), and the same at the measured threshold nearest to m, from both sides: (k, B)."""
    _, s, m = worst_case(levels, block)
    t = min(thresholds, key=lambda threshold: abs(threshold - float(m)))
    entries = torch.tensor([value * (1 + side * near) for value in (float(m), t) for side in (-1, 1)])
    return torch.cat([torch.full((4, 1), float(s)), entries[:, None].expand(4, block - 1)], dim=1)


def check(seed: int) -> Check:
    """Attack mango's encode and decode block by block, and compare with the form."""
    cases: list[Case] = []
    data: dict[str, Any] = {"attacks": [], "curves": curves()}
    for name, levels, blocks in (("nf4", NF4, (64, 128, 256)), ("fp4", FP4, (64,)), ("int8", DYNAMIC, (64, 256))):
        shipped, thresholds = probe(codecs.get(name, block=blocks[0]))
        strangers = sum(min(abs(level - float(known)) for known in levels) > 1e-7 for level in shipped)
        cases.append(Case(f"{name}: levels that are not in the published codebook", 0.0, float(strangers)))
        for block in blocks:
            codec, label = codecs.get(name, block=block), f"{name}, B={block}"
            starts = search.block_starts(512, block, torch.Generator().manual_seed(seed + block))
            found = search.attack(round_trip(codec), starts, constructed(levels, thresholds, block, 1e-6), seed + block, pinned=1)
            form = float(worst_case(levels, block)[0])
            exact = displaced_worst_case(shipped, thresholds, block) if name == "int8" else form
            what = "the form with the table's thresholds" if name == "int8" else "the form"
            for attack, measured in vars(found).items():
                cases.append(Case(f"{label}: {attack} against {what}", exact, measured, rounding=ROUNDING, within=1e-3))
            cases.append(Case(f"{label}: worst attack against the declared alpha", 1.0 - codec.alpha(), found.worst, rounding=ROUNDING))
            if name == "int8":
                safe = float(worst_case(levels, block, TABLE)[0])
                cases.append(Case(f"{label}: worst attack against the safe bound", safe, found.worst, rounding=ROUNDING, within=1e-3))
            data["attacks"].append({"codec": name, "block": block, "form": form, "exact": exact} | vars(found))
    cases += half_precision(seed)
    for name in ("int4", "int2"):  # no codebook, but on the same figure: unbiased, so omega is what they declare
        codec = codecs.get(name, block=64)
        measured = affine_error(codec, seed)
        omega = codec.omega()
        assert omega is not None
        cases.append(Case(f"{name}, B=64: mean error of a constructed group against the declared omega", omega, measured))
        data["attacks"].append({"codec": name, "block": 64, "exact": omega, "constructed": measured})
    return Check(tuple(cases), control(seed), data)


def half_precision(seed: int) -> list[Case]:
    """NF4 with bf16 and fp16 tensors, whose decoded values are rounded once more."""
    cases, block = [], 64
    codec = codecs.get("nf4", block=block)
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        starts = search.block_starts(512, block, torch.Generator().manual_seed(seed)).to(dtype)
        worst = constructed(NF4, probe(codec)[1], block, 2 * UNIT_ROUNDOFF[dtype]).to(dtype)
        found = search.attack(round_trip(codec), starts, worst, seed, pinned=1)
        bound = inexact(float(worst_case(NF4, block)[0]), UNIT_ROUNDOFF[dtype])
        cases.append(Case(f"nf4, B={block}, {label}: worst attack against the corrected form", bound, found.worst, rounding=ROUNDING))
    return cases


def affine_error(codec: Codec, seed: int, draws: int = 512) -> float:
    """Mean relative error of stochastic rounding on the group (a, -a, 0, ..., 0), whose zeros lie between the two middle levels."""
    x = torch.zeros(draws, codec.block)
    x[:, 0], x[:, 1] = 1.0, -1.0
    generator = torch.Generator().manual_seed(seed)
    return float(search.ratios(lambda group: codec.decode(codec.encode(group, generator=generator)), x).mean())


def control(seed: int) -> Case:
    """Scales rounded themselves (double quantisation): a block far below the mean scale comes back larger than its own error bound."""
    codec = codecs.get("nf4", block=64, double_quant=True)
    x = search.block_starts(256, 64, torch.Generator().manual_seed(seed))
    x[0] *= 1e-4  # its scale is rounded to a multiple of the spread of all scales
    return Case(
        "nf4, B=64, double-quantised scales: error of a small block",
        float(worst_case(NF4, 64)[0]),
        float(search.ratios(round_trip(codec), x)[0]),
    )


def curves() -> dict[str, list[dict[str, float]]]:
    """1 - alpha against the block size: the form of each codebook and what each codec of mango declares."""
    forms = {"nf4": NF4, "fp4": FP4, "int8": DYNAMIC}
    drawn: dict[str, list[dict[str, float]]] = {}
    for name in codecs.REGISTRY:
        drawn[name] = []
        for block in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            blocked = bool(codecs.get(name).block)
            point = {"block": block, "declared": 1.0 - (codecs.get(name, block=block) if blocked else codecs.get(name)).alpha()}
            if codecs.get(name).unbiased:
                point["omega"] = codecs.get(name, block=block).omega() or 0.0
            if name in forms:
                point["form"] = float(worst_case([float(level) for level in forms[name]], block)[0])
            drawn[name].append(point)
    return drawn


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

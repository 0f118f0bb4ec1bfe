"""T1 measured: mango's codecs probed and attacked from outside, through encode and decode alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mango import codecs
from mango.codecs import Codec
from theory import search
from theory.base import Case, Check
from theory.codebooks import DYNAMIC, FP4, NF4, TABLE, displaced_worst_case, inexact, worst_case

ROUNDING = 1e-6  # of the measurement: float32 scales, quotients and products
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


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
    cases += [*half_precision(seed), *without_table()]
    for name in ("int4", "int2"):  # no codebook, but on the same figure: unbiased, so omega is what they declare
        codec = codecs.get(name, block=64)
        measured = affine_error(codec, seed)
        omega = codec.omega()
        assert omega is not None
        cases.append(Case(f"{name}, B=64: mean error of a constructed group against the declared omega", omega, measured))
        data["attacks"].append({"codec": name, "block": 64, "exact": omega, "constructed": measured})
    return Check(tuple(cases), control(seed), data)


def without_table() -> list[Case]:
    """The 8-bit map with true nearest rounding, which mango's table approximates, in float64: the form's own constant is attained."""
    levels = torch.tensor([float(level) for level in DYNAMIC], dtype=torch.float64)

    def nearest(x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True)
        return scale * levels[torch.searchsorted((levels[1:] + levels[:-1]) / 2, x / scale)]

    form, s, m = worst_case(DYNAMIC, 256)
    x = torch.full((1, 256), float(m), dtype=torch.float64)
    x[0, 0] = float(s)
    name = "8-bit map with nearest rounding instead of the table, B=256: constructed against the form"
    return [Case(name, float(form), float(search.ratios(nearest, x)[0]), rounding=1e-9, within=1e-9)]


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

"""Sixteen-level codebooks, two codes to a byte: the machinery behind NF4 and FP4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from math import inf, sqrt
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mango.codecs.base import TINY, loops, parts, roundoff
from mango.codecs.bits import add_uniform, pack
from mango.codecs.codebook import AbsmaxCodec, worst_error, worst_variance
from mango.errors import ConfigError
from mango.native.threads import run


class Bins(NamedTuple):
    """[-1, 1] cut into 2K + 1 equal bins, each of which holds at most one decision threshold.

    A value then needs one comparison, not fifteen: bin, threshold of that bin, code on its side. Equality goes to the lower side.
    """

    k: int
    offset: Tensor  # () float32, K + 3/2: bins count from 1
    threshold: Tensor  # (2K + 2,) float32: the least value on the upper side of each bin, +inf where all of the bin is one side
    code: Tensor  # (2 (2K + 2),) uint8: codes of the lower and the upper side of bin b at 2b - 1 and 2b

    def find(self, v: Tensor) -> Tensor:
        """The codes of v, uint8, (n,)."""
        bins = torch.add(self.offset, v, alpha=self.k).to(torch.int32)
        edge = self.threshold.index_select(0, bins)
        side = torch.sub(v, edge, out=edge).view(torch.int32).bitwise_right_shift_(31)  # the sign: -1 on the lower side, else 0
        return self.code.index_select(0, side.add_(bins, alpha=2))


def _bins(thresholds: Sequence[float], codes: Sequence[int], device: torch.device) -> Bins:
    """Bins for sorted thresholds, with the codes of the intervals between them."""
    k = 8
    while True:
        home = [int(t * k + k + 0.5) for t in thresholds]
        # a threshold nearer to an edge of its bin than float32 resolves could be missed by values on the other side of that edge
        apart = all(1e-4 < (t * k + k + 0.5) % 1 < 1 - 1e-4 for t in thresholds)
        if apart and len(set(home)) == len(home):
            break
        k *= 2
    edge, code, passed = [inf], [0], 0
    for b in range(2 * k + 1):
        inside = passed < len(home) and home[passed] == b
        edge.append(thresholds[passed] if inside else inf)
        code += [codes[passed], codes[passed + inside]]
        passed += inside
    edges = torch.tensor(edge, dtype=torch.float32, device=device)
    upper = torch.nextafter(edges, torch.full_like(edges, inf))  # equality goes to the lower side
    return Bins(k, torch.tensor(k + 1.5, device=device, dtype=torch.float32), upper, torch.tensor(code, dtype=torch.uint8, device=device))


@cache
def _midpoints(levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Decision thresholds (15,) float32, sorted, and the code of each interval between them, uint8 (16,); levels by code."""
    level = torch.tensor(levels, dtype=torch.float32, device="cpu")
    order = torch.argsort(level)  # puts the two zeros of FP4 in the order that they have in bitsandbytes
    return (level[order[:-1]] + level[order[1:]]) / 2, order.to(torch.uint8)


@cache
def _nearest(levels: tuple[float, ...], device: torch.device) -> Bins:
    """The code of the nearest level; levels by code."""
    thresholds, codes = _midpoints(levels)
    return _bins(thresholds.tolist(), codes.tolist(), device)


class Gaps(NamedTuple):
    """The gaps between sorted levels."""

    bins: Bins  # finds the gap that holds a value, by the index of its lower level
    level: Tensor  # (16,) float32, sorted
    code: Tensor  # (16,) uint8, the code of each


@cache
def _gaps(levels: tuple[float, ...], device: torch.device) -> Gaps:
    """Levels by code."""
    level, code = torch.tensor(levels, dtype=torch.float32, device="cpu").sort()
    bins = _bins(level[1:-1].unique().tolist(), level[:-1].unique(return_counts=True)[1].cumsum(0).sub(1).tolist(), device)
    return Gaps(bins, level.to(device), code.to(torch.uint8).to(device))


@cache
def _pair_table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """The two levels that a byte holds, as the 8 bytes of one float64, (256,): one look-up decodes two values."""
    level = torch.tensor(levels, dtype=torch.float32, device=device)
    return torch.stack([level.repeat_interleave(16), level.repeat(16)], dim=1).view(torch.float64).view(-1)


class FourBit(AbsmaxCodec):
    """A sixteen-level codebook, the first of two values in the upper half of a byte.

    Codes and scales equal ``bitsandbytes.functional.quantize_4bit`` on the CPU, byte for byte, also where that function treats the short
    block at the end differently (division instead of multiplication by the reciprocal, scale at least 1e-38).
    """

    bits = 4
    levels: ClassVar[tuple[float, ...]]  # by code

    def __init__(self, block: int = 64, double_quant: bool = False, stochastic: bool = False) -> None:
        super().__init__(block, double_quant)
        if stochastic and double_quant:
            raise ConfigError.of("double_quant", True, "False when stochastic: rounding the scales would bias the result")
        self.stochastic = self.unbiased = stochastic

    def alpha(self, dtype: torch.dtype = torch.float32) -> float:
        omega = self.omega(dtype)
        return super().alpha(dtype) if omega is None else max(0.0, 1.0 - omega)

    def omega(self, dtype: torch.dtype = torch.float32) -> float | None:
        """T6's closed form; in a 16-bit type rounded levels widen the gaps, which adds u g sqrt(B) + u^2 (1 + g sqrt(B)), g the widest."""
        if not self.stochastic:
            return None
        levels = sorted(set(self.levels))
        omega = worst_variance(levels, self.block)
        if dtype in (torch.float16, torch.bfloat16):
            u, spread = roundoff(dtype), max(b - a for a, b in pairwise(levels)) * sqrt(self.block)
            omega += u * spread + u * u * (1 + spread)
        return omega

    def _worst(self) -> float:
        return worst_error(sorted(set(self.levels)), self.block)

    def _absmax(self, flat: Tensor) -> Tensor:
        scales = super()._absmax(flat)
        if flat.numel() % self.block:
            scales[-1].clamp_(min=TINY)
        return scales

    def _encode_into(self, flat: Tensor, scales: Tensor, codes: Tensor, generator: torch.Generator | None) -> None:
        compiled = None if self.stochastic else loops(flat.device)
        for lo, hi, width, first, last in parts(flat.numel(), self.block, flat.device, compiled is not None):
            if compiled is not None:
                x, into = flat[lo:hi].to(torch.float32), codes[lo // 2 : (hi + 1) // 2]
                arrays = (x, scales[first:last], self.block, *self.thresholds(), into)
                run(compiled.encode_nibbles, last - first, self.block, *arrays)
                continue
            x = flat[lo:hi].to(torch.float32).view(-1, width)
            scale = scales[first:last].unsqueeze(1)
            if self.stochastic:
                found = self._draw(x, scale, flat.dtype, generator)
            else:
                v = x * (1.0 / scale.clamp(min=TINY)) if width == self.block else x / scale
                found = _nearest(self.levels, v.device).find(v.view(-1))
            if (hi - lo) % 2:  # the value that fills the last byte is 0
                found = torch.cat([found, _nearest(self.levels, x.device).find(x.new_zeros(1))])
            pack(found, 4, codes[lo // 2 : (hi + 1) // 2])

    def _draw(self, x: Tensor, scale: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
        """Unbiased rounding between the two levels around each value *as they will be decoded*, so that rounding to dtype adds no bias."""
        gaps = _gaps(self.levels, x.device)
        v = x / torch.where(scale > TINY, scale, 1.0)
        lower = gaps.bins.find(v.view(-1)).to(torch.int32)
        below = (gaps.level.index_select(0, lower).view_as(x) * scale).to(dtype).to(torch.float32)
        above = (gaps.level.index_select(0, lower + 1).view_as(x) * scale).to(dtype).to(torch.float32)
        up = x.sub(below).div_(above.sub_(below)).nan_to_num_(nan=0.0).clamp_(0.0, 1.0).view(-1)
        add_uniform(up, generator)  # at least 1 with the probability that up had
        return gaps.code.index_select(0, lower.add_(up.to(torch.int32)))

    def _decode_loop(self, compiled: ModuleType) -> Callable[..., None]:
        return compiled.decode_nibbles

    def thresholds(self) -> tuple[Tensor, Tensor]:
        """What the compiled loops compare with: see ``_midpoints``."""
        return _midpoints(self.levels)

    def table(self) -> Tensor:
        return _pair_table(self.levels, torch.device("cpu"))

    def _lookup(self, codes: Tensor, n: int) -> Tensor:
        return _pair_table(self.levels, codes.device).index_select(0, codes.to(torch.int32)).view(torch.float32)[:n]

"""Block-absmax codebook quantisers: each block of B values is divided by its largest magnitude and rounded to a codebook in [-1, 1].

Here is what NF4, FP4 and the 8-bit dynamic map share: scales, the check for NaN and infinity, double quantisation, and T1's worst case.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from math import sqrt
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from mango import native
from mango.codecs.base import TINY, Codec, admit, all_finite, buffers, deliver, loops, numel, parts, size, target, with_rounding
from mango.errors import ConfigError, NonFinite
from mango.native.threads import run
from mango.packed import Packed

SCALE_BLOCK = 256  # scales that share one scale when they are quantised themselves, as in bitsandbytes


def worst_error(levels: Sequence[float], block: int, slack: float = 0.0) -> float:
    """T1: the exact worst case 1 - alpha of nearest rounding to sorted ``levels`` in [-1, 1] with an absmax scale per block.

    The block's largest value sits at s = +-1 with rounding error e_s; each of the c = B-1 others is worst in the middle of a gap
    between levels, at distance m from zero with half-width h: max over s and gaps of (e_s^2 + c h^2) / (1 + c m^2), or e_s^2 alone.

    Args:
        levels: sorted codebook; contains 0.
        block: B.
        slack: how far a decision threshold may lie from the midpoint (1/65535 for a 65 536-entry table); the result is then a safe bound.
    """
    c = block - 1
    worst = 0.0
    for s in (-1.0, 1.0):
        at_scale = min((level - s) ** 2 for level in levels)
        worst = max(worst, at_scale)
        for low, high in pairwise(levels):
            h, m = (high - low) / 2 + slack, max(0.0, abs(low + high) / 2 - slack)
            worst = max(worst, (at_scale + c * h * h) / (1 + c * m * m))
    return worst


def worst_variance(levels: Sequence[float], block: int) -> float:
    """T6: the exact omega of unbiased rounding between adjacent levels, for a codebook that holds -1 and 1.

    A value v in the gap (a, b) has variance (v-a)(b-v); the largest ratio c (v-a)(b-v) / (1 + c v^2) is the positive root of
    w^2 + (1 + c a b) w - c (b-a)^2 / 4 = 0.
    """
    c = block - 1
    worst = 0.0
    for a, b in pairwise(levels):
        p = 1 + c * a * b
        worst = max(worst, (sqrt(p * p + c * (b - a) ** 2) - p) / 2)
    return worst


def check_block(block: int) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or not 8 <= block <= 65536 or block & (block - 1):
        raise ConfigError.of("block", block, "a power of two from 8 to 65536")


class AbsmaxCodec(Codec):
    """Codes plus one float32 scale, the exact absmax, per block.

    Args:
        block: B, values that share a scale; a power of two from 8 to 65536.
        double_quant: keep the scales themselves as 8-bit codes of their distance from their mean (QLoRA, arXiv:2305.14314).
            A block far below the mean can then expand, so there is no certificate: ``alpha`` is 0.

    Raises:
        ConfigError: for any other block size.
    """

    bits: ClassVar[int]

    def __init__(self, block: int, double_quant: bool = False) -> None:
        check_block(block)
        self.block = block
        self.double_quant = double_quant

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor", out: Packed | None = None) -> Packed:
        flat = admit(x, generator)
        scales = self._absmax(flat)
        # infinite or NaN values show in their block's scale, so n / B values are checked instead of n
        if not all_finite(scales):
            raise NonFinite(f"{name} holds NaN, infinity or a value beyond float32")
        if self.double_quant:
            return self._encode_double(flat, scales, x, generator, out)
        if out is None:
            into = {"codes": torch.empty(self._spec(x.shape)["codes"][0], dtype=torch.uint8, device=x.device), "scales": scales}
        else:
            into = buffers(self.name, x, self._spec(x.shape), out)
            into["scales"].copy_(scales)
        self._encode_into(flat, scales, into["codes"], generator)
        return Packed(self.name, x.shape, x.dtype, into, {"block": self.block})

    def decode(self, packed: Packed, *, out: Tensor | None = None) -> Tensor:
        self.check_kind(packed)
        codes, scales = packed.parts["codes"], self._scales(packed)
        assert isinstance(codes, Tensor)
        result = target(packed, codes.device, out)
        flat, block = result.view(-1), int(packed.numbers["block"])
        compiled = loops(codes.device)
        for lo, hi, width, first, last in parts(flat.numel(), block, codes.device, compiled is not None):
            if compiled is not None:
                direct = flat.dtype in (torch.float32, torch.bfloat16)
                values = flat[lo:hi] if direct else torch.empty(hi - lo, device=flat.device, dtype=torch.float32)
                stored = codes[lo * self.bits // 8 : -(-hi * self.bits // 8)]
                written = (scales[first:last], block, self.table(), native.float_bits(values))
                run(self._decode_loop(compiled), last - first, block, stored, *written)
                if not direct:
                    flat[lo:hi].copy_(values)
                continue
            values = self._lookup(codes[lo * self.bits // 8 : -(-hi * self.bits // 8)], hi - lo).view(-1, width)
            scale = scales[first:last].unsqueeze(1)
            scale = torch.where(scale > TINY, scale, 0.0)
            if flat.dtype == torch.float32:
                torch.mul(values, scale, out=flat[lo:hi].view(-1, width))
            else:
                flat[lo:hi].view(-1, width).copy_(values.mul_(scale))
        return deliver(result, out)

    def nbytes(self, shape: Sequence[int]) -> int:
        if not self.double_quant:
            return size(self._spec(shape))
        blocks = -(-numel(shape) // self.block)
        return self._spec(shape)["codes"][0] + _scale_codec().nbytes((blocks,)) + 4

    def alpha(self, dtype: torch.dtype = torch.float32) -> float:
        return 0.0 if self.double_quant else max(0.0, 1.0 - with_rounding(self._worst(), dtype))

    @abstractmethod
    def _worst(self) -> float:
        """1 - alpha in exact arithmetic."""

    @abstractmethod
    def _encode_into(self, flat: Tensor, scales: Tensor, codes: Tensor, generator: torch.Generator | None) -> None:
        """Fills ``codes`` for the finite values of ``flat``."""

    @abstractmethod
    def _decode_loop(self, compiled: ModuleType) -> Callable[..., None]:
        """The compiled loop that decodes (codes, scales, block, levels, out)."""

    @abstractmethod
    def table(self) -> Tensor:
        """What the compiled loop looks codes up in: levels (256,) float32, or the two levels of a byte as (256,) float64."""

    @abstractmethod
    def _lookup(self, codes: Tensor, n: int) -> Tensor:
        """The levels of n values, float32, (n,); the caller overwrites it."""

    def _spec(self, shape: Sequence[int]) -> dict[str, tuple[int, torch.dtype]]:
        n = numel(shape)
        return {"codes": (-(-n * self.bits // 8), torch.uint8), "scales": (-(-n // self.block), torch.float32)}

    def _absmax(self, flat: Tensor) -> Tensor:
        """Largest magnitude of each block in float32, (blocks,)."""
        scales = torch.empty(-(-flat.numel() // self.block), dtype=torch.float32, device=flat.device)
        compiled = loops(flat.device)
        for lo, hi, width, first, last in parts(flat.numel(), self.block, flat.device, compiled is not None):
            if compiled is not None:
                bits = flat[lo:hi].to(torch.float32).view(torch.int32)
                peaks = scales[first:last].view(torch.int32)
                run(compiled.absmax, last - first, self.block, bits, self.block, peaks)
            else:
                scales[first:last] = flat[lo:hi].view(-1, width).abs().amax(dim=1)
        return scales

    def _scales(self, packed: Packed) -> Tensor:
        """The scales to decode with, (blocks,)."""
        scales = packed.parts["scales"]
        if isinstance(scales, Packed):
            scales = _scale_codec().decode(scales) + packed.parts["mean"]  # type: ignore[operator]
        return scales

    def _encode_double(self, flat: Tensor, scales: Tensor, x: Tensor, generator: torch.Generator | None, out: Packed | None) -> Packed:
        spec = {"codes": self._spec(x.shape)["codes"], "mean": (1, torch.float32)}
        outer = inner = None
        if out is not None:
            found = out.parts.get("scales")
            inner = found if isinstance(found, Packed) else None
            outer = Packed(out.kind, out.shape, out.dtype, {part: value for part, value in out.parts.items() if value is not inner})
        into = buffers(self.name, x, spec, outer)
        into["mean"].copy_(scales.mean() if len(scales) else scales.new_zeros(()))
        packed_scales = _scale_codec().encode(scales - into["mean"], out=inner)
        self._encode_into(flat, scales, into["codes"], generator)
        return Packed(self.name, x.shape, x.dtype, {**into, "scales": packed_scales}, {"block": self.block})


@cache
def _scale_codec() -> Codec:
    from mango.codecs.int8 import Int8  # int8 is itself an AbsmaxCodec

    return Int8(block=SCALE_BLOCK)

"""Stochastic int4 and int2: unbiased rounding to equally spaced levels between a group's least and largest value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from mango.codecs.base import TINY, Codec, admit, all_finite, buffers, deliver, loops, numel, parts, roundoff, size, target
from mango.codecs.bits import add_uniform, draws, pack
from mango.codecs.codebook import check_block
from mango.errors import NonFinite
from mango.native.threads import run
from mango.packed import Packed

ULP = 2.0**-7  # relative spacing of bfloat16, in which zero points and scales are kept


class Affine(Codec):
    r"""A value x of a group becomes the code :math:`\lfloor (x - z)/s + U \rfloor`, U uniform on (0, 1), and is read back as z + s·code.

    The zero point z is the group's minimum rounded down to bfloat16, and the scale s the rest of its range over L = 2^bits - 1,
    rounded up: the levels cover the group, so E[decode(encode(x))] = x. Four bytes a group: 0.5625 (int4) and 0.3125 (int2) bytes
    a value at 64. For float16 and bfloat16 tensors the probabilities are those of the levels as they will be decoded in that type,
    so that rounding adds no bias.

    Probabilities are resolved to 2^-16. Values up to 1e38; a group whose largest magnitude is not above 1e-38 decodes to zeros.

    Args:
        block: values in a group; a power of two from 8 to 65536.

    Raises:
        ConfigError: for any other group size.
    """

    unbiased = True
    stochastic = True
    bits: ClassVar[int]

    def __init__(self, block: int = 64) -> None:
        check_block(block)
        self.block = block

    def omega(self, dtype: torch.dtype = torch.float32) -> float:
        r"""B (1+e)^2 (1 + (1+e)^2) / (4 L^2), e = 2^-7 the spacing of bfloat16. Derived here.

        Every value has variance at most s^2/4, and s <= (1+e) (max - z) / L. If the group has both signs, z >= (1+e) min and
        (max - z)^2 <= (1 + (1+e)^2) (max^2 + min^2), at most that factor times the group's squared norm; if it has one sign,
        (max - z)^2 is at most (1+e)^2 times it. Up to the rounding of z and s, and (B-2)/B, this is attained by +a, -a and zeros,
        which lie halfway between the two middle levels: B / (2 L^2).
        In a 16-bit type gaps grow by at most u (|lower| + |upper|) <= 2u (|x| + s): sqrt(omega') = (1 + 2u) sqrt(omega) + u.
        """
        grown = (1 + ULP) ** 2
        omega = self.block * grown * (1 + grown) / (4 * (2**self.bits - 1) ** 2)
        if dtype in (torch.float16, torch.bfloat16):
            u = roundoff(dtype)
            omega = ((1 + 2 * u) * sqrt(omega) + u) ** 2
        return omega

    def alpha(self, dtype: torch.dtype = torch.float32) -> float:
        """1 - omega where that is positive."""
        return max(0.0, 1.0 - self.omega(dtype))

    def nbytes(self, shape: Sequence[int]) -> int:
        return size(self._spec(shape))

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor", out: Packed | None = None) -> Packed:
        flat = admit(x, generator)
        zeros, scales = self._range(flat)
        # NaN and infinity show in their group's scale, and so does a range that float32 does not hold
        if not all_finite(scales):
            raise NonFinite(f"{name} holds NaN, infinity or values whose range is beyond float32")
        into = buffers(self.name, x, self._spec(x.shape), out)
        into["zeros"].copy_(zeros)
        into["scales"].copy_(scales)
        steps = torch.where(scales > 0, scales, 1.0)
        compiled = None if flat.dtype in (torch.float16, torch.bfloat16) else loops(flat.device)
        for lo, hi, width, first, last in parts(flat.numel(), self.block, flat.device, compiled is not None):
            if compiled is not None:
                groups = (part[first:last] for part in (zeros, steps))
                limits = (self.block, float(2**self.bits - 1), draws(hi - lo, flat.device, generator), self.bits)
                stored = into["codes"][lo * self.bits // 8 : -(-hi * self.bits // 8)]
                run(compiled.encode_affine, last - first, width, flat[lo:hi].to(torch.float32), *groups, *limits, stored)
                continue
            values = flat[lo:hi].to(torch.float32).view(-1, width)
            zero, scale, step = (t[first:last].unsqueeze(1) for t in (zeros, scales, steps))
            v = values.sub(zero).div_(step)  # (groups, width) in [0, L]
            if flat.dtype in (torch.float16, torch.bfloat16):
                v = self._as_decoded(values, v, zero, scale, flat.dtype)
            codes = add_uniform(v, generator).clamp_(0, 2**self.bits - 1).view(-1).to(torch.int8).view(torch.uint8)
            pack(codes, self.bits, into["codes"][lo * self.bits // 8 : -(-hi * self.bits // 8)])
        return Packed(self.name, x.shape, x.dtype, into, {"block": self.block})

    def decode(self, packed: Packed, *, out: Tensor | None = None) -> Tensor:
        self.check_kind(packed)
        codes, zeros, scales = packed.tensors()
        result = target(packed, codes.device, out)
        flat, block = result.view(-1), int(packed.numbers["block"])
        table = _table(self.bits, codes.device)
        zeros, scales = zeros.to(torch.float32), scales.to(torch.float32)
        compiled = loops(codes.device)
        for lo, hi, width, first, last in parts(flat.numel(), block, codes.device, compiled is not None):
            if compiled is not None:
                stored = codes[lo * self.bits // 8 : -(-hi * self.bits // 8)]
                groups = (zeros[first:last], scales[first:last], block)
                decode_compiled(compiled.decode_affine, stored, *groups, self.bits, half_table(self.bits), flat[lo:hi])
                continue
            index = codes[lo * self.bits // 8 : -(-hi * self.bits // 8)].to(torch.int32)
            values = table.index_select(0, index).view(torch.float32)[: hi - lo].view(-1, width)
            zero, scale = zeros[first:last].unsqueeze(1), scales[first:last].unsqueeze(1)
            flat[lo:hi].view(-1, width).copy_(values.mul_(scale).add_(zero))
        return deliver(result, out)

    def _spec(self, shape: Sequence[int]) -> dict[str, tuple[int, torch.dtype]]:
        n = numel(shape)
        groups = -(-n // self.block)
        return {"codes": (-(-n * self.bits // 8), torch.uint8), "zeros": (groups, torch.bfloat16), "scales": (groups, torch.bfloat16)}

    def _range(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Zero point and scale of each group: bfloat16 numbers held in float32, (groups,)."""
        groups = -(-flat.numel() // self.block)
        low, high = (torch.empty(groups, dtype=torch.float32, device=flat.device) for _ in range(2))
        compiled = loops(flat.device)
        for lo, hi, width, first, last in parts(flat.numel(), self.block, flat.device, compiled is not None):
            if compiled is not None:
                bits = flat[lo:hi].to(torch.float32).view(torch.int32)
                ends = (end[first:last].view(torch.int32) for end in (low, high))
                run(compiled.extremes, last - first, width, bits, self.block, *ends)
                continue
            values = flat[lo:hi].view(-1, width)
            low[first:last], high[first:last] = values.amin(dim=1), values.amax(dim=1)
        low, high = low.add_(0.0), high.add_(0.0)  # no zero is negative, whichever of two the search has met
        flushed = (low.abs() <= TINY) & (high.abs() <= TINY)
        low, high = low.masked_fill_(flushed, 0.0), high.masked_fill_(flushed, 0.0)
        zeros = round_bf16(low, up=False)
        return zeros, round_bf16((high - zeros) / (2**self.bits - 1), up=True)

    def _as_decoded(self, x: Tensor, v: Tensor, zero: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Position of x between the levels around it as decoded in dtype: lower code + probability of the upper one."""
        lower = v.floor_().clamp_(0, 2**self.bits - 2)
        below = lower.mul(scale).add_(zero).to(dtype).to(torch.float32)
        above = lower.add(1).mul_(scale).add_(zero).to(dtype).to(torch.float32)
        return x.sub(below).div_(above.sub_(below)).nan_to_num_(nan=0.0).clamp_(0.0, 1.0).add_(lower)


def round_bf16(x: Tensor, up: bool) -> Tensor:
    """x rounded up or down to a bfloat16 number, as float32."""
    nearest = x.to(torch.bfloat16)
    beyond = torch.full_like(nearest, float("inf") if up else float("-inf"))
    wrong = nearest < x if up else nearest > x
    return torch.where(wrong, torch.nextafter(nearest, beyond), nearest).to(torch.float32)


@cache
def _table(bits: int, device: torch.device) -> Tensor:
    """The codes that a byte holds as float32, side by side in one wide element: one look-up decodes two (int4) or four (int2) values."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    shifts = torch.arange(8 - bits, -1, -bits, device=device)
    codes = ((byte >> shifts) & (2**bits - 1)).to(torch.float32).contiguous()
    return codes.view(torch.float64 if bits == 4 else torch.complex128).view(-1)


def decode_compiled(
    loop: Callable[..., None], codes: Tensor, zeros: Tensor, scales: Tensor, block: int, bits: int, table: Tensor, into: Tensor
) -> None:
    """into (n,) = level * scale + zero by the compiled loop; zeros, scales: (groups,) float32; table: as ``half_table``, of the levels."""
    values = into if into.dtype == torch.float32 else torch.empty(into.numel(), device=into.device, dtype=torch.float32)
    run(loop, len(scales), block, codes, zeros, scales, block, bits, table, values)
    if values is not into:
        into.copy_(values)


@cache
def half_table(bits: int) -> Tensor:
    """What the compiled loop looks up: the two codes of a byte (four bits) or of half a byte (two), as the 8 bytes of one float64."""
    code = torch.arange(1 << 2 * bits, device="cpu")
    return torch.stack([code >> bits, code & (2**bits - 1)], dim=1).to(torch.float32).view(torch.float64).view(-1)


class Int4(Affine):
    """Sixteen levels a group: omega = 0.1457 at 64."""

    name = "int4"
    bits = 4


class Int2(Affine):
    """Four levels a group: omega = 3.64 at 64, so no contraction is certified."""

    name = "int2"
    bits = 2

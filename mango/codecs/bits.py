"""Small codes in bytes, and the random numbers that stochastic rounding consumes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WORD = {4: torch.int16, 2: torch.int32, 1: torch.int64}  # holds the codes of one byte, a byte each


def pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Writes codes below 2^bits, uint8 (n,), into bytes (ceil(n bits / 8),), the first in the uppermost bits; zeros fill the last byte.

    The codes of one byte are read as one integer whose lowest byte is the first code. One product moves each code to its place in the
    uppermost byte: code i by (8 + bits) (each - 1 - i) bits, and no two terms of the product overlap.
    """
    each = 8 // bits
    if codes.numel() % each:
        codes = torch.cat([codes, codes.new_zeros(each - codes.numel() % each)])
    factor = sum(1 << (8 + bits) * i for i in range(each))
    signed = factor - (1 << 64) if factor >> 63 else factor
    out.copy_((codes.view(WORD[bits]) * signed).bitwise_right_shift_(8 * (each - 1)))  # the copy keeps the lowest byte


@cache
def _unpack_table(bits: int, device: torch.device) -> Tensor:
    """The codes that a byte holds, (256, 8 / bits) uint8, as one integer each."""
    each = 8 // bits
    byte = torch.arange(256, device=device).unsqueeze(1)
    codes = (byte >> (8 - bits * torch.arange(1, each + 1, device=device))) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(WORD[bits]).view(-1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes, uint8 (n,)."""
    return _unpack_table(bits, packed.device).index_select(0, packed.to(torch.int32)).view(torch.uint8)[:n]


def draws(n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Independent draws from -32768 … 32767, int16 (n,).

    Four come out of one 64-bit number, because drawing is most of the cost of stochastic rounding.
    """
    words = torch.empty(-(-n // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:n]


def add_uniform(v: Tensor, generator: torch.Generator | None) -> Tensor:
    """v + (i + 1/2) / 65536 in place, i an independent draw from 0..65535 for each value."""
    draw = draws(v.numel(), v.device, generator).view_as(v).to(torch.float32)
    return v.add_(draw, alpha=2.0**-16).add_(32768.5 * 2.0**-16)

"""Small codes in bytes, and the random numbers that stochastic rounding consumes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, uint8 (n,), to bytes (ceil(n bits / 8),), the first code in the uppermost bits; zeros fill the last byte.

    A run of codes that shares a byte is read as one integer (the first code is its lowest byte) and folded with shifts.
    """
    each = 8 // bits
    if codes.numel() % each:
        codes = torch.cat([codes, codes.new_zeros(each - codes.numel() % each)])
    word = codes.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[each])
    packed = word >> (8 * (each - 1))
    for i in range(each - 1):
        packed |= word >> (8 * i) << (8 - bits * (i + 1))
    return packed.to(torch.uint8)


@cache
def _unpack_table(bits: int, device: torch.device) -> Tensor:
    """The codes that a byte holds, (256, 8 / bits) uint8, as one integer each."""
    each = 8 // bits
    byte = torch.arange(256, device=device).unsqueeze(1)
    codes = (byte >> (8 - bits * torch.arange(1, each + 1, device=device))) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[each]).view(-1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes, uint8 (n,)."""
    return _unpack_table(bits, packed.device).index_select(0, packed.to(torch.int32)).view(torch.uint8)[:n]


def uniform(n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """n independent values of (i + 1/2) / 65536, float32 (n,).

    Four come out of one 64-bit draw, because drawing is most of the cost of stochastic rounding.
    """
    words = torch.empty(-(-n // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:n].to(torch.float32).add_(32768.5).mul_(2.0**-16)

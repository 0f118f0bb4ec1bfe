"""8-bit dynamic quantisation with bitsandbytes' signed map (arXiv:2110.02861), byte for byte what its CPU kernel writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from mango.codecs.base import loops, parts
from mango.codecs.codebook import AbsmaxCodec, worst_error
from mango.native.threads import run

CPU = torch.device("cpu")
TABLE = 65536  # entries of the table that maps a value in [-1, 1] to a code
# half the spacing of the table, and the rounding of v + 1 and of its product with 32767.5 in float32
SLACK = 1 / (TABLE - 1) + 2.0**-22


@cache
def dynamic_map(device: torch.device = CPU) -> Tensor:
    """The 256 sorted levels, float32. Seven decades; the one nearest to 1 has 64 linear steps for each sign, the next 32, and so on
    (dynamic tree quantisation, arXiv:1511.04561). There is 0 and +1 but no -1: the least level is -0.99297.

    The formula follows bitsandbytes' ``create_dynamic_map`` operation by operation, so that both round alike.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device=CPU)
        means = (edges[:-1] + edges[1:]) / 2.0
        levels += (10.0 ** (exponent - 6) * means).tolist() + (-(10.0 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


@cache
def code_table(device: torch.device = CPU) -> Tensor:
    """The code of the level nearest to -1 + 2 i / 65535, uint8 (65536,)."""
    levels = dynamic_map()
    value = -1.0 + (2.0 * torch.arange(TABLE, dtype=torch.float32, device=CPU)) / (TABLE - 1)
    return torch.searchsorted(0.5 * (levels[:-1] + levels[1:]), value).to(torch.uint8).to(device)


class Int8(AbsmaxCodec):
    """One byte a value plus a float32 scale per block; codes and scales equal ``bitsandbytes.functional.quantize_blockwise`` on the CPU.

    Departures and consequences:
        * bitsandbytes' CPU kernel looks codes up in a table of 65 536 values, so a zero decodes to 2.125e-5 of the block's absmax, not
          to 0. We keep that, on every device: codes are the same everywhere, and ``alpha`` is T1's safe bound with the table's spacing.
        * A block whose absmax is not above 1e-38 stores bitsandbytes' codes and scale but decodes to zeros: its codes are noise where
          1/absmax overflows.
    """

    name = "int8"
    bits = 8

    def __init__(self, block: int = 256, double_quant: bool = False) -> None:
        super().__init__(block, double_quant)

    def _worst(self) -> float:
        return worst_error(dynamic_map().double().tolist(), self.block, SLACK)

    def _encode_into(self, flat: Tensor, scales: Tensor, codes: Tensor, generator: torch.Generator | None) -> None:
        table = code_table(flat.device)
        compiled = loops(flat.device)
        if compiled is not None:
            for lo, hi, _, first, last in parts(flat.numel(), self.block, flat.device, compiled=True):
                x = flat[lo:hi].to(torch.float32)
                run(compiled.encode_bytes, last - first, self.block, x, scales[first:last], self.block, table, codes[lo:hi])
            return
        half = torch.tensor(0.5, device=flat.device, dtype=torch.float32)
        for lo, hi, width, first, last in parts(flat.numel(), self.block, flat.device):
            v = flat[lo:hi].to(torch.float32).view(-1, width) * (1.0 / scales[first:last]).unsqueeze(1)
            # reciprocals of zero and of subnormal scales are infinite: bitsandbytes ends in entry 0 at 0 * inf and clamps the rest to +-1
            v.nan_to_num_(nan=-1.0, posinf=1.0, neginf=-1.0)
            entry = torch.add(half, v.add_(1.0), alpha=(TABLE - 1) / 2)
            torch.index_select(table, 0, entry.view(-1).to(torch.int32), out=codes[lo:hi])

    def _decode_loop(self, compiled: ModuleType) -> Callable[..., None]:
        return compiled.decode_bytes

    def table(self) -> Tensor:
        return dynamic_map()

    def _lookup(self, codes: Tensor, n: int) -> Tensor:
        return dynamic_map(codes.device).index_select(0, codes.to(torch.int32))

"""One bit a value: signs, and their mean magnitude."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mango.codecs.base import roundoff
from mango.codecs.bits import pack, unpack
from mango.compressors.base import Compressor, flat_values
from mango.packed import Packed


class Sign(Compressor):
    """C(x) = (||x||_1 / d) sign(x), with sign(0) = 1 (scaled sign, arXiv:1901.09847).

    ||C(x) - x||^2 = ||x||^2 - ||x||_1^2 / d exactly, so alpha = 1/d, reached by a single non-zero entry. A relative error t of the
    mean turns it into (1 - t^2)/d. In float16 the mean of a sparse tensor leaves the range of normal numbers: nothing is certified there.
    """

    name = "sign"

    def compress(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
        flat = flat_values(x, generator, name)
        mean = flat.abs().mean(dtype=torch.float64) if flat.numel() else torch.zeros((), dtype=torch.float64, device=x.device)
        signs = torch.empty(-(-flat.numel() // 8), dtype=torch.uint8, device=x.device)
        pack((~torch.signbit(flat)).view(torch.uint8), 1, signs)
        return Packed(self.name, x.shape, x.dtype, {"signs": signs, "mean": mean.to(torch.float32).view(1)})

    def decompress(self, packed: Packed) -> Tensor:
        self.check_kind(packed)
        signs, mean = packed.tensors()
        sign = unpack(signs, 1, packed.shape.numel()).to(torch.float32).mul_(2).sub_(1)
        return sign.mul_(mean).to(packed.dtype).view(packed.shape)

    def alpha(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        if dtype == torch.float16:
            return 0.0
        off = roundoff(dtype) + 2.0**-23
        return (1 - off * off) / max(1, torch.Size(shape).numel())

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return -(-torch.Size(shape).numel() // 8) + 4

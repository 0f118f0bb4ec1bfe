"""Natural compression: random rounding to a power of two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mango.codecs.bits import pack, unpack
from mango.compressors.base import Compressor, flat_values
from mango.errors import NonFinite
from mango.packed import Packed


class Natural(Compressor):
    """Each value goes to one of the two powers of two around its magnitude, such that the mean is the value (arXiv:1905.10988).

    omega = 1/8, reached at 4/3 of a power of two. Stored are the exponent (8 bits) and the sign (1 bit) of a float32. Values below
    2^-126 go to 0 or 2^-126: unbiased still, but without the bound on the variance.
    """

    name = "natural"
    unbiased = True

    def compress(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
        """Raises NonFinite also for a magnitude above the largest power of two that the dtype holds (2^15 for float16, 2^127 else)."""
        values = flat_values(x, generator, name).to(torch.float32)
        largest = 2.0**15 if x.dtype == torch.float16 else 2.0**127
        if bool((values.abs() > largest).any()):
            raise NonFinite(f"{name} holds a magnitude above {largest:g}, which cannot be rounded up to a power of two in {x.dtype}")
        # a float32 is exponent * 2^23 + fraction, so adding a uniform fraction carries into the exponent with just the right probability
        magnitude = values.view(torch.int32) & 0x7FFFFFFF
        fraction = torch.empty_like(magnitude).random_(0, 1 << 23, generator=generator)
        exponents = magnitude.add_(fraction).bitwise_right_shift_(23).to(torch.uint8)
        signs = torch.empty(-(-values.numel() // 8), dtype=torch.uint8, device=x.device)
        pack(torch.signbit(values).view(torch.uint8), 1, signs)
        return Packed(self.name, x.shape, x.dtype, {"exponents": exponents, "signs": signs})

    def decompress(self, packed: Packed) -> Tensor:
        self.check_kind(packed)
        exponents, signs = packed.tensors()
        magnitude = exponents.to(torch.int32) << 23
        negative = unpack(signs, 1, exponents.numel()).to(torch.int32) << 31
        return (magnitude | negative).view(torch.float32).to(packed.dtype).view(packed.shape)

    def alpha(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        return 7 / 8

    def omega(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        return 1 / 8

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        d = torch.Size(shape).numel()
        return d + -(-d // 8)

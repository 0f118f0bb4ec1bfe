"""No compression: the control of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mango.compressors.base import Compressor, flat_values
from mango.packed import Packed


class Identity(Compressor):
    """C(x) = x."""

    name = "identity"
    unbiased = True

    def compress(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
        return Packed(self.name, x.shape, x.dtype, {"values": flat_values(x, generator, name).clone()})

    def decompress(self, packed: Packed) -> Tensor:
        self.check_kind(packed)
        (values,) = packed.tensors()
        return values.clone().view(packed.shape)

    def alpha(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        return 1.0

    def omega(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        return 0.0

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return torch.Size(shape).numel() * dtype.itemsize

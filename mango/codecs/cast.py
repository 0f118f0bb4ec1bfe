"""Codecs that store a rounded copy: fp32 and bf16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mango.codecs.base import Codec, admit, all_finite, buffers, deliver, numel, roundoff, size, target
from mango.errors import NonFinite
from mango.packed import Packed


class Cast(Codec):
    """Rounds to nearest in ``storage``; values beyond its largest number are stored as that number."""

    storage: ClassVar[torch.dtype]

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor", out: Packed | None = None) -> Packed:
        flat = admit(x, generator)
        if not all_finite(flat):
            raise NonFinite(f"{name} holds NaN or infinity")
        into = buffers(self.name, x, self._spec(x.shape), out)
        into["values"].copy_(flat)
        limits = torch.finfo(self.storage)
        if torch.finfo(x.dtype).max > limits.max:
            into["values"].clamp_(limits.min, limits.max)
        return Packed(self.name, x.shape, x.dtype, into)

    def decode(self, packed: Packed, *, out: Tensor | None = None) -> Tensor:
        self.check_kind(packed)
        (values,) = packed.tensors()
        result = target(packed, values.device, out)
        result.view(-1).copy_(values)
        limits = torch.finfo(packed.dtype)
        if torch.finfo(self.storage).max > limits.max:
            result.clamp_(limits.min, limits.max)
        return deliver(result, out)

    def alpha(self, dtype: torch.dtype = torch.float32) -> float:
        """1 - u^2 where the storage is coarser than dtype, else 1."""
        stored, given = torch.finfo(self.storage), torch.finfo(dtype)
        exact = stored.eps <= given.eps and stored.smallest_normal <= given.smallest_normal
        return 1.0 if exact else 1.0 - roundoff(self.storage) ** 2

    def nbytes(self, shape: Sequence[int]) -> int:
        return size(self._spec(shape))

    def _spec(self, shape: Sequence[int]) -> dict[str, tuple[int, torch.dtype]]:
        return {"values": (numel(shape), self.storage)}


class FP32(Cast):
    """Four bytes a value; exact but for float64."""

    name = "fp32"
    storage = torch.float32


class BF16(Cast):
    """Two bytes a value: the upper half of a float32, rounded to nearest even."""

    name = "bf16"
    storage = torch.bfloat16

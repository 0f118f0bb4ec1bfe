"""Some of the entries: the largest (TopK), or a random subset (RandK)."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from mango.codecs.base import roundoff
from mango.compressors.base import Compressor, check_count, flat_values, resolve_count
from mango.errors import NonFinite
from mango.packed import Packed


class Sparse(Compressor):
    """k values and their positions, which are kept in the smallest integer type that holds them."""

    def __init__(self, k: int | float) -> None:
        check_count("k", k)
        self.k = k

    def count(self, shape: Sequence[int]) -> int:
        """The number of entries kept of a tensor of this shape. Raises ConfigError if there are fewer."""
        d = torch.Size(shape).numel()
        return resolve_count("k", self.k, d, f"the number of entries of shape {tuple(shape)}")

    def decompress(self, packed: Packed) -> Tensor:
        self.check_kind(packed)
        values, positions = packed.parts["values"], packed.parts["positions"]
        assert isinstance(values, Tensor) and isinstance(positions, Tensor)
        flat = torch.zeros(packed.shape.numel(), dtype=packed.dtype, device=values.device)
        flat[positions.to(torch.int64)] = values
        return flat.view(packed.shape)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return self.count(shape) * (dtype.itemsize + index_type(torch.Size(shape).numel()).itemsize)

    def _kept(self, shape: Sequence[int]) -> float:
        d = torch.Size(shape).numel()
        return self.count(shape) / d if d else 1.0

    def _pack(self, x: Tensor, values: Tensor, positions: Tensor) -> Packed:
        return Packed(self.name, x.shape, x.dtype, {"values": values, "positions": positions.to(index_type(x.numel()))})


class TopK(Sparse):
    """The k entries of largest magnitude; alpha = k/d, reached when all magnitudes are equal.

    Args:
        k: entries kept, or their fraction (rounded down, at least one).

    Raises:
        ConfigError: k below 1, or, once the shape is known, above the number of entries.
    """

    name = "topk"

    def __init__(self, k: int | float = 1 / 16) -> None:
        super().__init__(k)

    def compress(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
        flat = flat_values(x, generator, name)
        positions = flat.abs().topk(self.count(x.shape), sorted=False).indices
        return self._pack(x, flat[positions], positions)

    def alpha(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        return self._kept(shape)


class RandK(Sparse):
    """k entries chosen uniformly without replacement.

    Scaled by d/k it is unbiased with omega = d/k - 1; in float16 and bfloat16 the scaled values are rounded stochastically, which
    adds u^2 d/k. Unscaled it is biased with E-alpha = k/d.

    Args:
        k: entries kept, or their fraction (rounded down, at least one).
        scaled: multiply by d/k.

    Raises:
        ConfigError: k below 1, or, once the shape is known, above the number of entries.
    """

    name = "randk"

    def __init__(self, k: int | float = 1 / 4, scaled: bool = True) -> None:
        super().__init__(k)
        self.scaled = self.unbiased = scaled

    def compress(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
        """Raises NonFinite also when a scaled value is beyond the dtype's largest number."""
        flat = flat_values(x, generator, name)
        positions = torch.randperm(flat.numel(), generator=generator, device=x.device)[: self.count(x.shape)]
        values = flat[positions]
        if self.scaled and len(values):
            factor = flat.numel() / len(values)
            if x.dtype in (torch.float16, torch.bfloat16):
                values = round_stochastically(values.to(torch.float32) * factor, x.dtype, generator)
            else:
                values = values * factor
            if not bool(torch.isfinite(values).all()):
                raise NonFinite(f"{name} times d/k = {factor:g} is beyond {x.dtype}")
        return self._pack(x, values, positions)

    def alpha(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        omega = self.omega(shape, dtype)
        return self._kept(shape) if omega is None else max(0.0, 1.0 - omega)

    def omega(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float | None:
        if not self.scaled:
            return None
        kept = self._kept(shape)
        return 1.0 / kept - 1.0 + roundoff(dtype) ** 2 / kept if kept < 1.0 else 0.0


def index_type(d: int) -> torch.dtype:
    """The smallest integer type that counts to d - 1."""
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        if d - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """x rounded to one of its two neighbours in dtype such that the mean is x; infinite beyond the largest number."""
    nearest = x.to(dtype)
    below = torch.where(nearest > x, torch.nextafter(nearest, torch.full_like(nearest, -inf)), nearest)
    above = torch.nextafter(below, torch.full_like(nearest, inf))
    up = (x - below.to(x.dtype)) / (above.to(x.dtype) - below.to(x.dtype))
    draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return torch.where(torch.isfinite(nearest) & (draw < up), above, torch.where(torch.isfinite(nearest), below, nearest))

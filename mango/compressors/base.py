"""The contract of a compressor: an operator on tensors that declares what it guarantees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from mango.codecs.base import admit, all_finite
from mango.errors import ConfigError, NonFinite
from mango.packed import Packed


class Compressor(ABC):
    """C is alpha-contractive if E||C(x) - x||^2 <= (1 - alpha) ||x||^2 for every x.

    Tensors with more than two dimensions are folded to a matrix (shape[0], product of the rest), as a convolution's
    (out, in * kh * kw); vectors and scalars to one row.

    Attributes:
        name: its name in the registry.
        unbiased: whether E[C(x)] = x for every x.
    """

    name: ClassVar[str]
    unbiased: bool = False

    @abstractmethod
    def compress(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
        """What would be sent or kept instead of x.

        Args:
            x: any shape, real floating point.
            generator: on x's device; makes a randomised compressor reproducible.
            name: said in the error when x is not finite.

        Raises:
            NonFinite: if x holds NaN or infinity.
            ConfigError: if x is of another type, if the generator lives on another device, if a rank or k exceeds what x has.
        """

    @abstractmethod
    def decompress(self, packed: Packed) -> Tensor:
        """A tensor of ``packed.shape`` and ``packed.dtype``. Needs the payload alone: no state of this object takes part."""

    @abstractmethod
    def alpha(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        """Certified worst-case contraction for tensors of this shape and dtype, rounding included; 0.0 = no certificate.

        Meant for tensors of ordinary magnitudes, as that of codecs: largest value of a block between 1e-36 and 1e36, and above 2^-11
        for float16.
        """

    @abstractmethod
    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Exactly ``compress(x).nbytes``, without compressing anything."""

    def omega(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float | None:
        """Variance bound of an unbiased compressor: E||C(x) - x||^2 <= omega ||x||^2; None when biased."""
        return None

    def __call__(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The round trip."""
        return self.decompress(self.compress(x, generator=generator))

    def check_kind(self, packed: Packed) -> None:
        if packed.kind != self.name:
            raise ConfigError.of("packed.kind", packed.kind, f"{self.name}, the compressor that is asked to restore it")


def fold(x: Tensor) -> Tensor:
    """View (or copy) of x as a matrix: (shape[0], rest); one row for vectors and scalars."""
    return x.reshape(folded(x.shape))


def folded(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the folded tensor."""
    return (1, prod(shape)) if len(shape) < 2 else (shape[0], prod(shape[1:]))


def flat_values(x: Tensor, generator: torch.Generator | None, name: str) -> Tensor:
    """The values of x in logical order, (d,), checked to be finite."""
    flat = admit(x, generator)
    if not all_finite(flat):
        raise NonFinite(f"{name} holds NaN or infinity")
    return flat


def check_count(field: str, value: int | float) -> None:
    """A number of directions or entries: an integer from 1, or a float in (0, 1] for a fraction of what there is."""
    legal = not isinstance(value, bool) and ((isinstance(value, int) and value >= 1) or (isinstance(value, float) and 0 < value <= 1))
    if not legal:
        raise ConfigError.of(field, value, "an integer >= 1, or a float in (0, 1] for a fraction")


def resolve_count(field: str, value: int | float, available: int, of: str) -> int:
    """The integer that ``value`` means when there are ``available``: fractions are rounded down, to at least 1."""
    if available == 0:
        return 0
    if isinstance(value, float):
        return max(1, int(value * available))
    if value > available:
        raise ConfigError.of(field, value, f"at most {available}, {of}")
    return value


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to dtype; what is beyond its largest number becomes that number instead of infinity."""
    limits = torch.finfo(dtype)
    return x.clamp(limits.min, limits.max).to(dtype) if limits.max < torch.finfo(x.dtype).max else x.to(dtype)

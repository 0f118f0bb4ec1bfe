"""The contract of a codec: how a tensor is stored. Storage only; no algorithm lives here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, prod, sqrt
from types import ModuleType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mango import native
from mango.errors import ConfigError
from mango.packed import Packed

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CPU_PART = (1 << 15) - 1
LOOP_PART = 1 << 22
TINY = 1e-38  # a block whose largest magnitude is not above this decodes to zeros: 1 / absmax leaves the range of float32 there


class Codec(ABC):
    """Stores a tensor of any shape, dtype or stride as bit-packed codes and scales.

    Arithmetic is in float32 whatever the dtype; float64 tensors are rounded to it first.

    Attributes:
        name: its name in the registry.
        unbiased: whether E[decode(encode(x))] = x for every x.
        stochastic: whether encoding draws random numbers (then ``generator`` makes it reproducible).
        block: values that share one scale; 0 when there are no scales.
    """

    name: ClassVar[str]
    unbiased: bool = False
    stochastic: bool = False
    block: int = 0

    @abstractmethod
    def encode(
        self,
        x: Tensor,  # any shape, floating dtype, any stride
        *,
        generator: torch.Generator | None = None,  # on x's device; used by stochastic codecs only
        name: str = "tensor",  # said in the error when x is not finite
        out: Packed | None = None,  # a payload of the same codec and shape whose tensors are overwritten
    ) -> Packed:
        """Raises: NonFinite if x holds NaN or infinity (``out`` is then untouched); ConfigError if out does not fit, if x is not real
        floating point, or if the generator lives on another device."""

    @abstractmethod
    def decode(self, packed: Packed, *, out: Tensor | None = None) -> Tensor:
        """Returns a tensor of ``packed.shape`` and ``packed.dtype``, written into ``out`` when given, which may be bfloat16 for float32."""

    @abstractmethod
    def alpha(self, dtype: torch.dtype = torch.float32) -> float:
        """Certified worst case: E||decode(encode(x)) - x||^2 <= (1 - alpha) ||x||^2 for all x of this dtype; 0.0 = no certificate.

        The inequality is that of exact arithmetic for float32 and float64, whose rounding adds a few 2^-24 to the norm of the error; for
        float16 and bfloat16 the rounding of what is decoded is included (T1). It is meant for tensors of ordinary magnitudes: blocks whose
        largest value is between 1e-36 and 1e38, and for float16 above 2^-11, below which the spacing of its numbers is no longer relative.
        """

    @abstractmethod
    def nbytes(self, shape: Sequence[int]) -> int:
        """Exactly ``encode(x).nbytes`` for x of this shape, without encoding anything."""

    def omega(self, dtype: torch.dtype = torch.float32) -> float | None:
        """Variance bound of an unbiased codec: E||C(x) - x||^2 <= omega ||x||^2; None when the codec is biased."""
        return None

    def check_kind(self, packed: Packed) -> None:
        if packed.kind != self.name:
            raise ConfigError.of("packed.kind", packed.kind, f"{self.name}, the codec that is asked to decode it")


class Part(NamedTuple):
    """A run of whole blocks of the flat tensor, or the short block at its end, small enough to stay in the processor's cache."""

    lo: int  # first value
    hi: int  # one past the last value
    width: int  # values in each of its blocks
    first: int  # index of its first block
    last: int  # one past the index of its last block


def parts(n: int, block: int, device: torch.device, compiled: bool = False) -> Iterator[Part]:
    """Cuts n values into parts. A GPU and a compiled loop have no cache to respect, only scratch memory to bound.

    On a CPU a part stays below the 32768 values from which torch splits an operation between threads: the table look-up that dominates
    is never split, the other operations gain little at a size that fits the cache, and their barriers are slow on a shared processor.
    """
    step = max(1, (LOOP_PART if compiled else CPU_PART if device.type == "cpu" else 1 << 26) // block) * block
    full = n - n % block
    for lo in range(0, full, step):
        hi = min(lo + step, full)
        yield Part(lo, hi, block, lo // block, hi // block)
    if full < n:
        yield Part(full, n, n - full, full // block, full // block + 1)


def loops(device: torch.device) -> ModuleType | None:
    """The compiled loops for tensors on this device, or None where the torch code is to run."""
    if not native.ready(device):
        return None
    from mango.native import codecs

    return codecs


def admit(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """The values of x in logical order as one flat tensor, checked; a view where the strides allow it."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise ConfigError.of("dtype", getattr(x, "dtype", type(x).__name__), "float16, bfloat16, float32 or float64")
    check_generator(x, generator)
    return x.detach().reshape(-1)


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite, by one reduction and without a mask of the tensor's size; the meta device has no values."""
    return x.is_meta or x.numel() == 0 or all(isfinite(end.item()) for end in x.aminmax())


def check_generator(x: Tensor, generator: torch.Generator | None) -> None:
    if generator is None or generator.device == x.device:
        return
    if generator.device.type != x.device.type or generator.device.index is not None:
        raise ConfigError.of("generator.device", str(generator.device), f"the tensor's device, {x.device}")


def buffers(kind: str, x: Tensor, spec: Mapping[str, tuple[int, torch.dtype]], out: Packed | None) -> dict[str, Tensor]:
    """The tensors to encode into: those of ``out`` when it fits x and the spec (name -> count, dtype), else new ones."""
    if out is None:
        return {part: torch.empty(count, dtype=dtype, device=x.device) for part, (count, dtype) in spec.items()}
    found = {part: out.parts.get(part) for part in spec}
    fits = out.kind == kind and out.shape == x.shape and out.dtype == x.dtype and len(out.parts) == len(spec)
    for part, (count, dtype) in spec.items():
        tensor = found[part]
        fits = fits and isinstance(tensor, Tensor) and tensor.shape == (count,) and tensor.dtype == dtype and tensor.device == x.device
    if not fits:
        legal = f"a {kind} payload of {tuple(x.shape)} {x.dtype} with the same options, on {x.device}"
        raise ConfigError.of("out", f"{out.kind} payload of {tuple(out.shape)} {out.dtype}", legal)
    return {part: tensor for part, tensor in found.items() if isinstance(tensor, Tensor)}


def target(packed: Packed, device: torch.device, out: Tensor | None) -> Tensor:
    """A contiguous tensor to decode into: ``out`` itself when it is contiguous, else a new one that is copied to it afterwards."""
    if out is None:
        return torch.empty(packed.shape, dtype=packed.dtype, device=device)
    fits = out.dtype == packed.dtype or (out.dtype, packed.dtype) == (torch.bfloat16, torch.float32)
    if out.shape != packed.shape or not fits or out.device != device:
        raise ConfigError.of("out", f"{tuple(out.shape)} {out.dtype} on {out.device}", f"{tuple(packed.shape)} {packed.dtype} on {device}")
    return out if out.is_contiguous() else torch.empty(packed.shape, dtype=packed.dtype, device=device)


def deliver(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None or out is result else out.copy_(result)


def size(spec: Mapping[str, tuple[int, torch.dtype]]) -> int:
    """Bytes of the tensors that a spec describes."""
    return sum(count * dtype.itemsize for count, dtype in spec.values())


def numel(shape: Sequence[int]) -> int:
    return prod(shape)


def roundoff(dtype: torch.dtype) -> float:
    """u: rounding a real number to a normal number of this dtype errs by at most u times its magnitude."""
    return torch.finfo(dtype).eps / 2


def with_rounding(error: float, dtype: torch.dtype) -> float:
    """1 - alpha' of an operator with 1 - alpha = ``error`` whose output is rounded to dtype: sqrt(1-alpha') = q + u (1 + q) (T1).

    Only the 16-bit types are corrected: the certificate in float32 is that of exact arithmetic.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return error
    q = sqrt(error)
    return (q + roundoff(dtype) * (1 + q)) ** 2

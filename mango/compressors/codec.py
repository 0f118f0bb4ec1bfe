"""A codec's round trip as a compressor."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from mango import codecs
from mango.compressors.base import Compressor
from mango.errors import ConfigError
from mango.packed import Packed

FP32 = 2.0**-23  # rounding of the scaled value and of the decoded one in float32, relative


class Codec(Compressor):
    """C(x) = decode(encode(x)).

    Args:
        codec: a codec, or the name of one.
        options: of the codec when it is named, such as ``block=128``.

    Raises:
        ConfigError: for an unknown name or an option that is not legal.
    """

    name = "codec"

    def __init__(self, codec: str | codecs.Codec = "nf4", **options: Any) -> None:
        if isinstance(codec, codecs.Codec) and options:
            raise ConfigError.of("options", options, "none beside a codec that is already built")
        self.codec: codecs.Codec = codec if isinstance(codec, codecs.Codec) else codecs.get(codec, **options)
        self.unbiased = self.codec.unbiased

    def compress(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
        return self.codec.encode(x, generator=generator, name=name)

    def decompress(self, packed: Packed) -> Tensor:
        return self.codec.decode(packed)

    def alpha(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        """The codec's, less what float32 arithmetic adds."""
        if self.unbiased:
            return max(0.0, 1.0 - (self.omega(shape, dtype) or 0.0))
        alpha = self.codec.alpha(dtype)
        if alpha in (0.0, 1.0):
            return alpha
        q = sqrt(1.0 - alpha)
        return max(0.0, 1.0 - (q + FP32 * (1.0 + q)) ** 2)

    def omega(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float | None:
        omega = self.codec.omega(dtype)
        return None if omega is None else (sqrt(omega) + FP32 * (1.0 + sqrt(omega))) ** 2

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return self.codec.nbytes(shape)

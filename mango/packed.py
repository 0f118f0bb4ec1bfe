"""What is stored in place of a tensor: bytes, scales and the little that is needed to read them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """The payload of a codec or a compressor.

    Attributes:
        kind: the registry name of what made it; decoding with another is an error.
        shape: shape of the tensor it stands for.
        dtype: dtype of the tensor it stands for, and of what decoding returns.
        parts: the stored tensors by name ("codes", "scales", ...); a part may itself be packed (LRQ's factors).
        numbers: plain numbers that decoding needs (block size, rank).
    """

    kind: str
    shape: torch.Size
    dtype: torch.dtype
    parts: Mapping[str, Tensor | Packed]
    numbers: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of every stored tensor, to the byte; python objects are not counted."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def device(self) -> torch.device:
        return next(self.tensors()).device

    def tensors(self) -> Iterator[Tensor]:
        """Every stored tensor, depth first."""
        for part in self.parts.values():
            if isinstance(part, Packed):
                yield from part.tensors()
            else:
                yield part

"""One quantity (a basis, a moment, an error) of many same-shaped layers, stored by a codec in one payload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mango import codecs
from mango.errors import ConfigError
from mango.packed import Packed


class Stacked:
    """A tensor of shape (layers, *shape) held as codes and scales, each layer in blocks of its own.

    A layer whose values do not fill its last block is padded with zeros, so that no block spans two layers and the state
    of each layer is a view of the stack: it can be saved, loaded and regrouped alone. A new stack holds zeros.

    Args:
        codec: registry name of the codec.
        layers: number of layers in the stack.
        shape: shape of one layer.
        device: where the codes live.
    """

    def __init__(self, codec: str, layers: int, shape: Sequence[int], device: torch.device) -> None:
        self.codec = codecs.get(codec)
        self.layers, self.shape, self.numel = layers, tuple(shape), prod(shape)
        self.padding = -self.numel % self.codec.block if self.codec.block else 0
        values = self.numel + self.padding
        block = 1, self.codec.block or 1
        # sizes alone are often wanted, perhaps of thousands of stacks
        zeros = _sizes(codec, *block) if device.type == "meta" else _zeros(codec, *block, device)
        self.packed: Packed = _filled(_sizes(codec, layers, values), zeros)

    def read(self, out: Tensor | None = None) -> Tensor:
        """The decoded tensor (layers, *shape), float32; written into a contiguous ``out`` when given, float32 or bfloat16."""
        if out is not None and not self.padding:
            self.codec.decode(self.packed, out=out.view(self.layers, self.numel))
            return out
        values = self.codec.decode(self.packed)[:, : self.numel].reshape(self.layers, *self.shape)
        return values if out is None else out.copy_(values)

    def write(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> None:
        """Store x (layers, *shape) over what was held, into the same tensors."""
        flat = x.reshape(self.layers, self.numel)
        self.codec.encode(F.pad(flat, (0, self.padding)) if self.padding else flat, generator=generator, name=name, out=self.packed)

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by name, as views (layers, values per layer)."""
        views = {}
        for name, part in self.packed.parts.items():
            if isinstance(part, Packed) or part.numel() % self.layers:
                raise ConfigError.of("codec", self.codec.name, "a codec whose parts divide evenly between layers")
            views[name] = part.view(self.layers, -1)
        return views

    @property
    def nbytes(self) -> int:
        """Bytes of every stored tensor, padding included."""
        return self.packed.nbytes


def _zeros(codec: str, layers: int, values: int, device: torch.device) -> Packed:
    return codecs.get(codec).encode(torch.zeros(layers, values, device=device, dtype=torch.float32))


@cache
def _sizes(codec: str, layers: int, values: int) -> Packed:
    return _zeros(codec, layers, values, torch.device("meta"))


def _filled(sizes: Packed, content: Packed) -> Packed:
    """A payload of these sizes and this content, zeros that every block holds alike: to encode them all would take as long as a step."""
    parts: dict[str, Tensor | Packed] = {}
    for name, part in sizes.parts.items():
        one = content.parts[name]
        if isinstance(part, Packed):
            parts[name] = _filled(part, cast(Packed, one))
        else:
            one = cast(Tensor, one).view(-1)[:1]
            parts[name] = torch.empty_like(part, device=one.device).copy_(one.expand(part.shape))
    return replace(sizes, parts=parts)

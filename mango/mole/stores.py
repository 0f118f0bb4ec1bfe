"""How the input of a layer is kept for the backward pass: as it is, as codes, or as its product with a basis.

A store turns a matrix into the tensors that autograd saves, so that whoever counts saved tensors sees every byte that is kept.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from mango import codecs
from mango.packed import Packed


class Form(NamedTuple):
    """What is needed beside the saved tensors to read them back."""

    kind: str  # the codec, "dense" or "sketch"
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[str, ...] = ()
    block: int = 0


class Saved(NamedTuple):
    """A matrix as it is kept."""

    tensors: tuple[Tensor, ...]
    form: Form

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def save(x: Tensor, store: str, block: int, name: str) -> Saved:
    """Keep x (tokens, features) in a store that is not a sketch. Raises: NonFinite, naming the layer, for codes of NaN or infinity."""
    x = x.detach()
    if store == "dense":
        return Saved((x,), Form("dense", x.shape, x.dtype))
    packed = codec(store, block).encode(x, name=f"the input of {name}")
    return Saved(tuple(packed.tensors()), Form(packed.kind, packed.shape, packed.dtype, tuple(packed.parts), block))


def load(saved: Saved) -> Tensor:
    """The matrix as the store has it, in the dtype that it had; of a sketch, the product with its basis.

    It is decoded into fresh memory. Scratch memory that the layers share would be alive outside of the backward pass too, and on a CPU it
    gained no time, paired with this.
    """
    tensors, form = saved
    if form.kind in ("dense", "sketch"):
        return tensors[0]
    packed = Packed(form.kind, form.shape, form.dtype, dict(zip(form.parts, tensors, strict=True)), {"block": form.block})
    return codec(form.kind, form.block).decode(packed)


def codec(store: str, block: int) -> codecs.Codec:
    return codecs.get(store) if store == "bf16" else codecs.get(store, block=block)


class Shared:
    """Remembers the codes of the last input, so that layers that read the same tensor (queries, keys, values) encode it once, and
    whether a norm before them keeps that tensor anyway.

    The input is known by identity and version: one that was changed in place since is encoded again. Nothing is kept alive by being
    remembered: once a backward pass has freed the codes, the same input gets new ones, whose rounding is independent.
    """

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._key: tuple[object, ...] = ()
        self._saved: list[tuple[tuple[weakref.ref[Tensor], ...], Form]] = []
        self._kept: tuple[weakref.ref[Tensor], int] | None = None

    def keep(self, x: Tensor) -> None:
        """Told by a layer that x itself, its output, is kept for its own backward pass."""
        self._kept = (weakref.ref(x), x._version)

    def kept(self, x: Tensor) -> bool:
        """Whether x is kept as it is anyway, so that a code of it would take memory and lose precision for nothing."""
        return self._kept is not None and self._kept[0]() is x and self._kept[1] == x._version

    def get(self, x: Tensor, key: tuple[object, ...]) -> list[Saved] | None:
        if self._input is None or self._input() is not x or self._key != (x._version, *key):
            return None
        found = []
        for refs, form in self._saved:
            tensors = tuple(tensor for ref in refs if (tensor := ref()) is not None)
            if len(tensors) < len(refs):
                return None
            found.append(Saved(tensors, form))
        return found

    def put(self, x: Tensor, key: tuple[object, ...], saved: list[Saved]) -> None:
        self._input, self._key = weakref.ref(x), (x._version, *key)
        self._saved = [(tuple(weakref.ref(tensor) for tensor in one.tensors), one.form) for one in saved]

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        return Shared, ()  # a copy remembers nothing

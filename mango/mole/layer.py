"""One converted weight matrix: what it keeps of its input, and how its gradient is made from that."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mango.mole.config import MoleConfig
from mango.mole.gradients import REGISTRY, Gradient
from mango.mole.sketch import Sketch, Sketched
from mango.mole.stores import Form, Saved, Shared, save
from mango.mole.tracked import Tracked
from mango.mole.watch import Sink, Watch, compares, due


class Layer:
    """The state behind one weight matrix.

    Args:
        name: of the module in the model, said in every error and diagnostic.
        config: the dials.
        shape: of the weight, (outputs, inputs).
        number: of the layer in the model; with the seed and the step it determines what is drawn.
        shared: remembers the last input's codes, for all layers of one conversion.

    Attributes:
        steps: backward passes so far.
        sketch: the basis of the sketch store, else None.
        tracked: the basis of a factored gradient, else None.
        kept, replaced: bytes kept for the layer in the last forward pass, and bytes of the tensors in whose place they are kept. What
            another layer encoded already counts there, and so does what a norm keeps exactly.
        truth: the exact input of the last forward pass, by chunks, where a comparison with the true gradient is due.
        sink: takes rows of diagnostics; see mango.mole.watch.
    """

    def __init__(self, name: str, config: MoleConfig, shape: tuple[int, int], number: int, shared: Shared) -> None:
        self.name, self.config, self.shape, self.number, self.shared = name, config, shape, number, shared
        self.steps = 0
        self.sketch = Sketch(self) if config.store == "sketch" else None
        self.tracked = Tracked(self) if config.gradient == "factored" and self.sketch is None else None
        self.kept = self.replaced = 0
        self.truth: list[Tensor] = []
        self.sink: Sink | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "sink": None, "truth": []}  # a copy reports to nobody until it is told to

    @property
    def held(self) -> Sketch | Tracked | None:
        """The subspace that the layer tracks, if it has one."""
        return self.sketch if self.sketch is not None else self.tracked

    def save(self, x: Tensor, dtype: torch.dtype) -> list[Saved]:
        """Keep the input x (…, inputs), taken in dtype; one entry for each chunk of tokens."""
        config = self.config
        self.kept = self.replaced = 0
        parts = chunks(x.detach().to(dtype), config.chunk)
        self.remember(parts)
        if self.sketch is not None:
            found = [self.sketch.save(part) for part in parts]
            self.count(sum(one.nbytes for one in found), x.numel() * dtype.itemsize)
            return found
        if x.dtype == dtype and self.shared.kept(x):
            return [save(part, "dense", config.block, self.name) for part in parts]
        key = (config.store, config.block, config.chunk, dtype)
        known = self.shared.get(x, key)
        if known is not None:
            return known
        found = [save(part, config.store, config.block, self.name) for part in parts]
        self.shared.put(x, key, found)
        self.count(sum(one.nbytes for one in found), x.numel() * dtype.itemsize)
        return found

    @property
    def compared(self) -> bool:
        """Whether a comparison with the true gradient is due at the coming backward pass."""
        return compares(self.config, self.name, self.steps + 1)

    def remember(self, parts: Sequence[Tensor]) -> None:
        """Keep the exact input for a comparison, if one is due."""
        self.truth = list(parts) if self.compared else []

    def count(self, kept: int, replaced: int) -> None:
        """Add to the bytes of the present forward pass."""
        self.kept, self.replaced = self.kept + kept, self.replaced + replaced

    def gradient(self, first: Saved) -> Gradient:
        """Collects G = Σ Bᵀ A over chunks of one backward pass; ``first`` is the first chunk of the layer's input."""
        self.steps += 1
        diagnose, shadow = due(self, self.steps)
        watch = Watch(self, diagnose, shadow) if diagnose or shadow else None
        kind = REGISTRY.load(self.config.gradient) if self.sketch is None else partial(Sketched, basis=first.tensors[1])
        return kind(self, watch)


def chunks(x: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """x (…, features) as matrices of at most ``size`` tokens."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.split(size) if size is not None and len(flat) > size else (flat,)


def unflatten(tensors: tuple[Tensor, ...], forms: list[Form]) -> list[Saved]:
    """Saved tensors in a row as the matrices that they are of."""
    found, place = [], 0
    for form in forms:
        count = max(1, len(form.parts))
        found.append(Saved(tuple(tensors[place : place + count]), form))
        place += count
    return found

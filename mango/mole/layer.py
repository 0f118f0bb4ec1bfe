"""One converted weight matrix: what it keeps of its input, and how its gradient is made from that."""

from __future__ import annotations

import torch
from torch import Tensor

from mango.mole.config import MoleConfig
from mango.mole.gradients import REGISTRY, Gradient
from mango.mole.sketch import Sketch, Sketched
from mango.mole.stores import Form, Saved, Shared, save
from mango.mole.tracked import Tracked


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
    """

    def __init__(self, name: str, config: MoleConfig, shape: tuple[int, int], number: int, shared: Shared) -> None:
        self.name, self.config, self.shape, self.number, self.shared = name, config, shape, number, shared
        self.steps = 0
        self.sketch = Sketch(self) if config.store == "sketch" else None
        self.tracked = Tracked(self) if config.gradient == "factored" and self.sketch is None else None

    def save(self, x: Tensor, dtype: torch.dtype) -> list[Saved]:
        """Keep the input x (…, inputs), taken in dtype; one entry for each chunk of tokens."""
        config = self.config
        if self.sketch is not None:
            return [self.sketch.save(part) for part in chunks(x.detach().to(dtype), config.chunk)]
        key = (config.store, config.block, config.chunk, dtype)
        found = self.shared.get(x, key)
        if found is None:
            found = [save(part, config.store, config.block, self.name) for part in chunks(x.detach().to(dtype), config.chunk)]
            self.shared.put(x, key, found)
        return found

    def gradient(self, first: Saved) -> Gradient:
        """Collects G = Σ Bᵀ A over chunks of one backward pass; ``first`` is the first chunk of the layer's input."""
        self.steps += 1
        return REGISTRY.get(self.config.gradient, layer=self) if self.sketch is None else Sketched(self, first.tensors[1])


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

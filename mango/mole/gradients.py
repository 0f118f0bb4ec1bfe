"""How the gradient of a weight is made from a layer's inputs A (tokens, inputs) and output gradients B (tokens, outputs): G = Bᵀ A."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango.mole.factors import leave
from mango.registry import Registry

if TYPE_CHECKING:
    from mango.mole.layer import Layer
    from mango.mole.watch import Watch

REGISTRY = Registry("gradient", {"formed": "mango.mole.gradients:Formed", "factored": "mango.mole.gradients:Factored"})


class Gradient(ABC):
    """The gradient of one weight in one backward pass.

    Args:
        layer: whose weight it is.
        watch: looks at this backward pass, or None.
    """

    def __init__(self, layer: Layer, watch: Watch | None = None) -> None:
        self.layer, self.watch = layer, watch

    def add(self, b: Tensor, a: Tensor) -> None:
        """Tokens are added: output gradients b (tokens, outputs), inputs a (tokens, inputs)."""
        if self.watch is not None:
            self.watch.add(b)
        self._add(b, a)

    @abstractmethod
    def _add(self, b: Tensor, a: Tensor) -> None:
        """The same, after what looks on has seen b."""

    @abstractmethod
    def finish(self, parameter: Tensor) -> Tensor | None:
        """The gradient for autograd to accumulate in ``parameter.grad``; None where it is left as ``parameter.factors``."""


class Formed(Gradient):
    """The whole matrix. Autograd hands it on before the next layer forms its own, so with a fused step one layer's gradient is alive."""

    def __init__(self, layer: Layer, watch: Watch | None = None) -> None:
        super().__init__(layer, watch)
        self.total: Tensor | None = None

    def _add(self, b: Tensor, a: Tensor) -> None:
        if self.total is None:
            self.total = b.mT @ a
            return
        if self.total.dtype != torch.float32 and self.total.dtype != torch.float64:
            self.total = self.total.float()  # a sum over many chunks in 16 bits would lose its small terms
        if b.dtype == self.total.dtype:
            self.total.addmm_(b.mT, a)
        else:
            self.total.add_(b.mT @ a)

    def finish(self, parameter: Tensor) -> Tensor | None:
        if self.total is not None and self.watch is not None:
            self.watch.finish(self.total)
        return None if self.total is None else self.total.to(parameter.dtype)


class Factored(Gradient):
    """Top-k factors by power steps. A and B of the whole layer are held until they are taken; no product is larger than (k, inputs)."""

    def __init__(self, layer: Layer, watch: Watch | None = None) -> None:
        super().__init__(layer, watch)
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def _add(self, b: Tensor, a: Tensor) -> None:
        tracked = self.layer.tracked
        assert tracked is not None
        self.pairs.append((a, b) if tracked.columns else (b, a))

    def finish(self, parameter: Tensor) -> Tensor | None:
        tracked = self.layer.tracked
        if not self.pairs or tracked is None:
            return None
        factors, products = tracked.step(self.pairs)
        if self.watch is not None:
            self.watch.finish(factors, products)
        if self.layer.config.fill_grad:
            return factors.product().to(parameter.dtype)
        leave(parameter, factors)
        return None

"""The sketch store: only A·Q is kept, so only the part of the gradient in the span of Q can be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango.draws import gaussian
from mango.mole.factors import Factors, leave
from mango.mole.gradients import Gradient
from mango.mole.stores import Form, Saved
from mango.orthonormal import orthonormalize

if TYPE_CHECKING:
    from mango.mole.layer import Layer
    from mango.mole.watch import Watch


class Sketch:
    """The basis Q of a layer's inputs, (inputs, rank), and how it moves.

    With "scouts" Q follows the right singular directions of what it has seen itself, Y = Bᵀ A Q: they come from a running mean of YᵀY, the
    weakest are replaced by fresh Gaussian directions of the complement, and a direction that Q misses can only come in as a scout. With
    "random" each step draws Q anew, as CompAct does (arXiv:2410.15352).

    Args:
        layer: whose inputs it sketches.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer, self.inputs = layer, layer.shape[1]
        self.rank = layer.config.columns(self.inputs)
        self.basis: Tensor | None = None
        self.previous: Tensor | None = None
        self.seen: Tensor | None = None  # (rank, rank) running YᵀY in the coordinates of the basis

    def _draw(self, count: int, device: torch.device) -> Tensor:
        return gaussian((self.inputs, count), (self.layer.config.seed, self.layer.number, self.layer.steps), device)

    def reseed(self) -> None:
        """Forget the basis: the next forward pass draws one."""
        self.basis = self.previous = self.seen = None

    def save(self, x: Tensor) -> Saved:
        """Keep x (tokens, inputs) as x Q, with Q: the basis may have moved when the backward pass comes."""
        if self.basis is None:
            self.basis = orthonormalize(self._draw(self.rank, x.device))
        return Saved((x @ self.basis.to(x.dtype), self.basis), Form("sketch", x.shape, x.dtype, ("product", "basis")))

    def move(self, y: Tensor) -> None:
        """After a backward pass that gave Y (outputs, rank) for the present basis."""
        assert self.basis is not None
        config = self.layer.config
        self.previous = self.basis
        if config.sketch_basis == "random":
            self.basis = orthonormalize(self._draw(self.rank, y.device))
            return
        now = y.mT @ y
        decay = config.warm_start_decay
        seen = now if self.seen is None else decay * self.seen + (1.0 - decay) * now
        values, turn = torch.linalg.eigh(seen)
        basis = self.basis @ turn.flip(1)  # (inputs, rank) strongest first
        fresh = min(config.scouts, self.rank, self.inputs - self.rank)
        values = values.flip(0).clamp_min(0.0)
        if fresh:
            kept = basis[:, : self.rank - fresh]
            scouts = self._draw(fresh, y.device)
            basis = orthonormalize(torch.cat([kept, scouts - kept @ (kept.mT @ scouts)], dim=1))
            values[self.rank - fresh :] = 0.0  # a scout has no history
        self.basis, self.seen = basis, torch.diag(values)


class Sketched(Gradient):
    """G Q Qᵀ, as a matrix or as factors."""

    def __init__(self, layer: Layer, watch: Watch | None, basis: Tensor) -> None:
        super().__init__(layer, watch)
        self.basis = basis
        self.total: Tensor | None = None

    def _add(self, b: Tensor, a: Tensor) -> None:
        part = (b.mT @ a).float()  # (outputs, rank): a is A Q
        self.total = part if self.total is None else self.total.add_(part)

    def finish(self, parameter: Tensor) -> Tensor | None:
        if self.total is None:
            return None
        y, config = self.total, self.layer.config
        if self.layer.sketch is not None and self.layer.sketch.basis is self.basis:  # else another pass has moved it already
            self.layer.sketch.move(y)
        factors = Factors(self.basis, y.mT, columns=True)
        if self.watch is not None:
            self.watch.finish(factors)
        if config.gradient == "formed" or config.fill_grad:
            return factors.product().to(parameter.dtype)
        leave(parameter, factors)
        return None

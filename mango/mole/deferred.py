"""Gradients of several weights made one after the other, though one backward pass gives the operands of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mango.mole.gradients import Gradient

Read = Callable[[], Tensor]  # gives a matrix when it is needed, decoded then


class Deferred:
    """The gradient of one weight, made when autograd comes to the weight's place in the graph.

    Args:
        gradient: collects it.
        weight: whose it is.
        sums: add up products as they come, which chunks of tokens need; else the one pair of operands waits.
    """

    def __init__(self, gradient: Gradient, weight: Tensor, sums: bool) -> None:
        self.gradient, self.weight, self.sums = gradient, weight, sums
        self.operands: tuple[Tensor, Read] | None = None

    def add(self, b: Tensor, a: Read) -> None:
        """As ``Gradient.add``: b (tokens, outputs), a (tokens, inputs)."""
        if self.sums:
            self.gradient.add(b, a())
        else:
            self.operands = (b, a)

    def make(self) -> Tensor | None:
        """As ``Gradient.finish``."""
        if self.operands is not None:
            b, a = self.operands
            self.gradient.add(b, a())
        return self.gradient.finish(self.weight)


Pending = dict[int, Deferred]  # left by the function that has the operands, taken at the places of the weights


def places(weights: Sequence[Tensor], pending: Pending) -> list[Tensor]:
    """Stand-ins for weights among the inputs of a function whose backward pass leaves gradients in ``pending`` and returns None for them.

    Autograd then runs a node of its own for each weight, at once and the first weight's first, and accumulates each gradient, with all
    hooks, before it runs the next: nodes that are ready run in the reverse order of their making, and accumulation before all others.
    """
    made = [_Place.apply(weight, pending, number) for number, weight in reversed([*enumerate(weights)])]
    return made[::-1]


class _Place(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, pending: Pending, number: int) -> Tensor:
        ctx.set_materialize_grads(False)  # nothing flows in but the signal that the operands are there
        ctx.pending, ctx.number = pending, number
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, None, None]:
        return ctx.pending.pop(ctx.number).make(), None, None

"""The activations that a converted MLP knows, each with its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[Tensor, Tensor]  # value, derivative


def relu2(u: Tensor) -> Pair:
    """relu(u)² (arXiv:2109.08668)."""
    r = functional.relu(u)
    return r.square(), r.mul_(2.0)


def relu(u: Tensor) -> Pair:
    return functional.relu(u), (u > 0).to(u.dtype)


def silu(u: Tensor) -> Pair:
    s = torch.sigmoid(u)
    value = u * s
    return value, torch.addcmul(s, value, 1.0 - s)


def gelu(u: Tensor) -> Pair:
    below = torch.special.ndtr(u)
    return u * below, torch.addcmul(below, u, u.square().mul_(-0.5).exp_().mul_(1.0 / math.sqrt(2.0 * math.pi)))


def gelu_tanh(u: Tensor) -> Pair:
    """GELU by its approximation with tanh."""
    c = math.sqrt(2.0 / math.pi)
    square = u.square()
    t = torch.tanh(u * c * (1.0 + 0.044715 * square))
    half = 0.5 * (1.0 + t)
    return u * half, half + 0.5 * u * (1.0 - t.square()) * c * (1.0 + 3 * 0.044715 * square)


ACTIVATIONS: dict[str, Callable[[Tensor], Pair]] = {
    "relu2": relu2,
    "relu": relu,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}


def hidden(activation: str, pre: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The hidden layer and its partial derivatives.

    Args:
        activation: f.
        pre: [u] for f(u), or [g, u] for the gated f(g) u; (tokens, hidden) each.

    Returns:
        The value, and its derivative by each of ``pre``.
    """
    value, derivative = ACTIVATIONS[activation](pre[0])
    if len(pre) == 1:
        return value, [derivative]
    return value * pre[1], [derivative.mul_(pre[1]), value]

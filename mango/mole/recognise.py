"""Which modules are MLPs that we know: seen by what they compute, not by their names."""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from mango.mole.activations import ACTIVATIONS, hidden

PROBE_TOKENS = 4


class Pattern(NamedTuple):
    """down(f(up(x))), or the gated down(f(gate(x)) * up(x))."""

    inputs: tuple[str, ...]  # names of the children: (up,) or (gate, up)
    output: str
    activation: str


def mlp(module: nn.Module) -> Pattern | None:
    """The pattern of an MLP, or None.

    Its children are two linear layers (relu², relu, GELU, SiLU between them) or three (SwiGLU and its like); whatever else it holds has
    no parameters and does not drop anything out. The module is run on a few tokens with random weights in place of its own, which may be
    zero, and what comes out must be the formula's.
    """
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    others = [child for child in module.modules() if child is not module and child not in linears.values()]
    if len(linears) not in (2, 3) or any(isinstance(other, nn.Linear) or getattr(other, "p", 0.0) for other in others):
        return None  # p: of a dropout, which may be asleep while the model is not in training
    own = {f"{name}.{part}" for name, linear in linears.items() for part, _ in linear.named_parameters()}
    if own != {name for name, _ in module.named_parameters()} or any(True for _ in module.buffers()):
        return None
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(p.shape, device="cpu", dtype=torch.float32).uniform_(-1, 1, generator=generator) / p.shape[-1] ** 0.5
        for name, p in module.named_parameters()
    }
    for names in permutations(linears):
        if not _fits([linears[name] for name in names]):
            continue
        x = torch.empty(PROBE_TOKENS, linears[names[0]].in_features, device="cpu", dtype=torch.float32).uniform_(-5, 5, generator=generator)
        try:
            with torch.no_grad():
                found = functional_call(module, weights, (x,))
        except Exception:  # whatever a foreign forward does with a lone tensor: it is not an MLP
            return None
        for activation in ACTIVATIONS:
            if isinstance(found, Tensor) and _same(found, _compute(names, activation, weights, x)):
                return Pattern(names[:-1], names[-1], activation)
    return None


def _fits(linears: list[nn.Linear]) -> bool:
    *inputs, output = linears
    return all(one.out_features == output.in_features and one.in_features == inputs[0].in_features for one in inputs)


def _compute(names: tuple[str, ...], activation: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    return linear(names[-1], hidden(activation, [linear(name, x) for name in names[:-1]])[0])


def _same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= 2e-5 * expected.norm())

"""Adversarial search for the input that a round trip (encode then decode) distorts most, relative to its norm.

Three attacks, reported apart: gradient ascent from many starts, an evolutionary search, and the worst case that the proof constructs.
The gradient is exact almost everywhere although the operator is piecewise constant: inside a cell the output C(x) is locally constant (a
quantiser) or optimal in its own argument (a projection on the best subspace, by the envelope theorem), so the gradient of ||x - C(x)||^2
is 2 (x - C(x)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log10

import torch
from torch import Tensor

RoundTrip = Callable[[Tensor], Tensor]  # (n, d) -> (n, d), row by row


@dataclass(frozen=True)
class Attack:
    """Largest relative squared error found by each attack."""

    ascent: float
    evolution: float
    constructed: float

    @property
    def worst(self) -> float:
        return max(self.ascent, self.evolution, self.constructed)


def ratios(round_trip: RoundTrip, x: Tensor) -> Tensor:
    """||C(x) - x||^2 / ||x||^2 of each row, (n,), summed in float64; a zero row counts as 0."""
    return _relative(round_trip(x), x)


def _relative(output: Tensor, x: Tensor) -> Tensor:
    error = (output.double() - x.double()).square().sum(1)
    return error / x.double().square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)


def ascend(
    round_trip: RoundTrip,
    starts: Tensor,  # (n, d)
    *,
    pinned: int = 0,  # leading entries that stay: a block's scale, which homogeneity allows to fix
    steps: int = 100,
    first: tuple[float, float] = (1e-4, 0.05),  # range of the rows' first steps (cells differ in width), relative to their largest entry
    last: float = 1e-6,  # to which all steps fall geometrically
) -> tuple[float, Tensor]:
    """Gradient ascent on the relative error of all rows at once: every other row by the gradient's signs (good where cells have corners),
    the rest by the gradient scaled to its largest entry (good where the error is smooth). Returns the largest ratio and its input (d,)."""
    x = starts.clone()
    scale = x.abs().amax(1, keepdim=True)
    rates = torch.logspace(log10(first[0]), log10(first[1]), len(x), dtype=x.dtype)[:, None]
    signed = (torch.arange(len(x)) % 2 == 0)[:, None]
    best, kept = torch.full((len(x),), -1.0, dtype=torch.float64), x
    for step in range(steps + 1):
        output = round_trip(x)
        current = _relative(output, x)
        better = current > best
        best, kept = torch.where(better, current, best), torch.where(better[:, None], x, kept)
        gradient = (x - output) - current[:, None].to(x.dtype) * x  # d(ratio)/dx up to the positive factor 2 / ||x||^2
        gradient[:, :pinned] = 0.0
        smooth = gradient / gradient.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        x = x + rates * (last / rates) ** (step / steps) * scale * torch.where(signed, gradient.sign(), smooth)
        x = torch.minimum(torch.maximum(x, -scale), scale)
    return float(best.max()), kept[best.argmax()]


def evolve(
    round_trip: RoundTrip,
    starts: Tensor,  # (n, d)
    generator: torch.Generator,
    *,
    pinned: int = 0,
    generations: int = 100,
) -> tuple[float, Tensor]:
    """(mu + lambda) evolution, gradient-free. Moves act on a random subset of a row: perturb each entry, copy one entry's magnitude to all
    (a block's error is separable, so what is worst for one entry is worst for each), cross with another row, flip signs, rescale.
    Returns the largest ratio and its input (d,)."""
    n, d = starts.shape
    population, fitness = starts.clone(), ratios(round_trip, starts)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=starts.dtype)

    def pick() -> Tensor:  # (n,) rows, the fitter the likelier: populations are kept sorted
        return (uniform(n).square() * n).long()

    for _ in range(generations):
        parents = population[pick()]
        mates = population[pick()]
        subset = uniform(n, d) < 10.0 ** (-2.0 * uniform(n, 1))
        source = torch.randint(pinned, d, (n, 1), generator=generator)
        tied = parents.gather(1, source).abs() * parents.sign()
        noise = parents * (1.0 + 10.0 ** (-5.0 * uniform(n, 1)) * torch.randn(n, d, generator=generator, dtype=starts.dtype))
        common = parents * (1.0 + 10.0 ** (-5.0 * uniform(n, 1)) * torch.randn(n, 1, generator=generator, dtype=starts.dtype))
        moves = torch.stack([noise, tied, mates, -parents, common])  # (5, n, d)
        kind = torch.randint(0, len(moves), (n,), generator=generator)
        children = torch.where(subset, moves[kind, torch.arange(n)], parents)
        scale = parents.abs().amax(1, keepdim=True)
        children[:, :pinned] = torch.where(uniform(n, 1) < 0.1, -1.0, 1.0) * parents[:, :pinned]
        children = torch.minimum(torch.maximum(children, -scale), scale)
        everyone, values = torch.cat([population, children]), torch.cat([fitness, ratios(round_trip, children)])
        order = values.argsort(descending=True, stable=True)[:n]
        population, fitness = everyone[order], values[order]
    return float(fitness[0]), population[0]


def attack(
    round_trip: RoundTrip,
    starts: Tensor,  # (n, d) random starts of both searches
    constructed: Tensor,  # (k, d) the proof's worst cases
    seed: int,
    *,
    pinned: int = 0,
    steps: int = 100,
    first: tuple[float, float] = (1e-4, 0.05),
    generations: int = 100,
) -> Attack:
    """All three attacks; neither search sees the constructed worst case."""
    generator = torch.Generator().manual_seed(seed)
    return Attack(
        ascent=ascend(round_trip, starts, pinned=pinned, steps=steps, first=first)[0],
        evolution=evolve(round_trip, starts, generator, pinned=pinned, generations=generations)[0],
        constructed=float(ratios(round_trip, constructed).max()),
    )


def block_starts(count: int, block: int, generator: torch.Generator) -> Tensor:
    """Random blocks (count, block) whose first entry is the absmax +-1, with magnitudes over three decades.

    A block's error is a sum over its entries, so what is worst for one entry is worst for each: three quarters of the rows start with one
    magnitude and one sign throughout, the magnitudes evenly spread on a logarithmic scale for each pair of signs. The rest are jittered.
    """
    tied = 3 * count // 4
    exponent = torch.cat([torch.linspace(0, 1, -(-tied // 4)).repeat_interleave(4)[:tied], torch.rand(count - tied, generator=generator)])
    exponent = exponent + torch.rand(1, generator=generator) / tied  # the seed shifts the grid
    jitter = 1.0 + torch.rand(count, 1, generator=generator) * (torch.rand(count, block, generator=generator) - 0.5)
    signs = torch.randint(0, 2, (count, block), generator=generator) * 2.0 - 1.0
    rows = torch.arange(tied)
    jitter[:tied] = 1.0
    signs[:tied] = torch.where(rows % 2 == 0, 1.0, -1.0)[:, None]
    signs[:tied, 0] = torch.where(rows % 4 < 2, 1.0, -1.0)
    x = (10.0 ** (-3.0 * exponent[:, None]) * jitter).clamp_max(1.0) * signs
    x[:, 0] = signs[:, 0]
    return x[torch.randperm(count, generator=generator)]

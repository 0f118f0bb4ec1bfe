"""What a policy may choose for a layer: a rank, bits of both factors, bits of the moments; and the choice for all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product

import torch
from torch import Tensor

from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes
from mango.optim.layers import LayerStack
from mango.optim.plan import LayerPlan, matrix_shape

Shape = tuple[int, ...]
BASIS = {16: "bf16", 8: "int8", 4: "nf4"}  # bits of both factors -> the codec of the basis ...
FACTOR = {16: None, 8: "int8", 4: "nf4"}  # ... and of the factor U; 16 leaves U exact, as it is not kept between steps
MOMENT = {16: "bf16", 8: "int8", 4: "nf4"}
BISECTIONS = 28  # steps of the search for the price of a byte


@dataclass(frozen=True)
class Actions:
    """The choices for one layer: every combination of a rank, a number of bits for both factors and one for the moments.

    What an action does not name (scouts, error, residual, ...) stays as the layer's own plan has it.

    Args:
        ranks: fractions of the smaller dimension, increasing.
        bits: of basis and factor, among 16, 8 and 4, decreasing.
        moments: bits of the moments, likewise.

    Raises: ConfigError.
    """

    ranks: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    bits: tuple[int, ...] = (16, 8, 4)
    moments: tuple[int, ...] = (16, 8, 4)

    def __post_init__(self) -> None:
        if not self.ranks or any(not isinstance(rank, float) or not 0.0 < rank <= 1.0 for rank in self.ranks):
            raise ConfigError.of("actions.ranks", self.ranks, "fractions in (0, 1], at least one")
        for field in ("bits", "moments"):
            value = getattr(self, field)
            if not value or any(bit not in BASIS for bit in value):
                raise ConfigError.of(f"actions.{field}", value, "among 16, 8 and 4, at least one")

    @cached_property
    def table(self) -> list[tuple[int, int, int]]:
        """Action -> places of its rank, bits and moments."""
        return list(product(range(len(self.ranks)), range(len(self.bits)), range(len(self.moments))))

    def __len__(self) -> int:
        return len(self.table)

    def plan(self, action: int, base: LayerPlan) -> LayerPlan:
        """The layer's plan under an action. Raises: ConfigError for a number that is no action."""
        if not 0 <= action < len(self):
            raise ConfigError.of("action", action, f"an integer from 0 to {len(self) - 1}")
        rank, bits, moments = self.table[action]
        bit = self.bits[bits]
        return replace(
            base, rank=self.ranks[rank], basis_codec=BASIS[bit], factor_codec=FACTOR[bit], moment_codec=MOMENT[self.moments[moments]]
        )

    def of(self, plan: LayerPlan) -> int:
        """The action whose plan is nearest to ``plan``: first in bits of the moments, then of the factors, then in rank."""

        def distance(action: int) -> tuple[float, ...]:
            own = self.plan(action, plan)
            rank = plan.rank if isinstance(plan.rank, float) else 1 / 8
            return own.moment_codec != plan.moment_codec, own.basis_codec != plan.basis_codec, abs(float(own.rank) - rank)

        return min(range(len(self)), key=distance)

    def allowed(self, shape: Shape) -> list[bool]:
        """Which actions are choices of their own: of ranks that round to the same number of columns only the smallest is."""
        rows, cols = matrix_shape(shape)
        columns = [LayerPlan(rank=rank).columns(rows, cols) for rank in self.ranks]
        fresh = [count not in columns[:place] for place, count in enumerate(columns)]
        return [fresh[rank] for rank, _, _ in self.table]

    def nbytes(self, shape: Shape, base: LayerPlan) -> list[int]:
        """Bytes of state under each action."""
        return list(_nbytes(self, shape, base))

    def alpha_min(self, shape: Shape, base: LayerPlan) -> float:
        """The least contraction certified for the layer under any action (T3, T4)."""
        return min(certified(shape, self.plan(action, base)) for action, allowed in enumerate(self.allowed(shape)) if allowed)


@cache
def _nbytes(actions: Actions, shape: Shape, base: LayerPlan) -> tuple[int, ...]:
    return tuple(layer_nbytes(shape, actions.plan(action, base)) for action in range(len(actions)))


@cache
def certified(shape: Shape, plan: LayerPlan) -> float:
    """The contraction of H -> P q(PᵀH) under a plan, in expectation over the scouts, with float32 products (T3, T4)."""
    return LayerStack(plan, matrix_shape(shape), 1, torch.device("meta"), "a parameter").contraction()


def choose(
    scores: Tensor,  # (n, A), larger is better
    nbytes: Tensor,  # (n, A)
    allowed: Tensor,  # (n, A) bool
    budget: int | None,  # bytes; None = no limit
) -> list[int]:
    """For each layer an allowed action, such that the total score is large and the bytes are at most ``budget``.

    Every byte gets a price, each layer takes its best action at that price, and the smallest price is sought that keeps the budget
    (Everett 1963, doi:10.1287/opre.11.3.399): that is optimal for the bytes it uses. What is left is then spent on the single changes that
    add most. The answer does not depend on the order of the layers, but for ties.

    Raises: ConfigError when not even the lightest actions keep the budget.
    """
    values = scores.double().masked_fill(~allowed, float("-inf"))
    weights = nbytes.double()
    free = values.argmax(1)
    if budget is None or _total(nbytes, free) <= budget:
        return free.tolist()
    taken = weights.masked_fill(~allowed, float("inf")).argmin(1)
    if _total(nbytes, taken) > budget:
        raise ConfigError.of("budget", budget, f"at least {_total(nbytes, taken)} bytes, the smallest allowed plan of each layer")
    # at a price of the largest gain for a single byte every layer is as light as it can be
    low, high = 0.0, float((values.amax(1) - values.masked_fill(~allowed, float("inf")).amin(1)).max()) + 1e-12
    for _ in range(BISECTIONS):
        price = low + (high - low) / 2 if low > 0.0 else high / 16  # prices are far below their bound: first its magnitude, then its digits
        found = (values - price * weights).argmax(1)
        if _total(nbytes, found) <= budget:
            high, taken = price, found
        else:
            low = price
    return _spend(values, nbytes, taken, budget)


def _total(nbytes: Tensor, taken: Tensor) -> int:
    return int(nbytes.gather(1, taken[:, None]).sum())


def _spend(values: Tensor, nbytes: Tensor, taken: Tensor, budget: int) -> list[int]:
    """Single changes that add to the score within what is left, best first."""
    for _ in range(len(taken)):
        left = budget - _total(nbytes, taken)
        gain = values - values.gather(1, taken[:, None])
        gain = gain.masked_fill(nbytes - nbytes.gather(1, taken[:, None]) > left, float("-inf"))
        best = int(gain.argmax())
        if not float(gain.flatten()[best]) > 0.0:
            break
        taken[best // values.shape[1]] = best % values.shape[1]
    return taken.tolist()


def check(choice: Sequence[int], nbytes: Tensor, allowed: Tensor, budget: int | None) -> None:
    """Refuse a decision that is not one. Raises: ConfigError for an action outside the mask, or bytes above the budget."""
    if len(choice) != len(allowed):
        raise ConfigError.of("actions", list(choice), f"one for each of {len(allowed)} layers")
    for layer, action in enumerate(choice):
        if not 0 <= action < allowed.shape[1] or not bool(allowed[layer, action]):
            legal = [place for place, ok in enumerate(allowed[layer].tolist()) if ok]
            raise ConfigError.of(f"action of layer {layer}", action, f"one that its mask allows: {legal}")
    total = sum(int(nbytes[layer, action]) for layer, action in enumerate(choice))
    if budget is not None and total > budget:
        raise ConfigError.of("actions", f"{total} bytes", f"at most the budget of {budget} bytes")

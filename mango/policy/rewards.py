"""From what an interval of training cost to one number: positive weights or augmented Chebyshev (T8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mango.errors import ConfigError
from mango.policy.scalarize import chebyshev, weighted_sum

COSTS = ("loss", "memory", "seconds", "joules")  # each smaller is better
KINDS = ("sum", "chebyshev")


@dataclass(frozen=True)
class Costs:
    """Of a part of a run, or of a whole one: parts add up.

    Attributes:
        loss: natural logarithm of the loss after over the loss before.
        memory: bytes of the layers' state over those of dense AdamW (8 for each value), times the part's share of the run.
        seconds: over those of the whole run under dense AdamW.
        joules: likewise; None where nothing measures them.
    """

    loss: float
    memory: float
    seconds: float
    joules: float | None = None


@dataclass(frozen=True)
class Reward:
    """Minus the scalarised costs.

    With positive weights, whatever maximises the sum is Pareto-optimal (T8). Chebyshev's scalarisation also finds the points of a front
    that is not convex; ``rho`` > 0 keeps it to Pareto-optimal ones.

    Args:
        weights: of loss, memory, seconds and joules, all > 0 for Pareto-optimal maximisers. That of joules counts only where they are
            measured.
        kind: "sum" or "chebyshev".
        reference: for "chebyshev", a point below every cost vector that occurs.
        rho: for "chebyshev", weight of the augmentation.

    Raises: ConfigError for weights that are negative, all zero or too few, or a kind that does not exist.
    """

    weights: tuple[float, ...] = (1.0, 0.5, 0.05, 0.05)
    kind: str = "sum"
    reference: tuple[float, ...] = (-4.0, -0.01, -0.01, -0.01)
    rho: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError.of("reward.kind", self.kind, "one of " + ", ".join(KINDS))
        if len(self.weights) != len(COSTS) or len(self.reference) != len(COSTS):
            raise ConfigError.of("reward.weights", self.weights, f"one for each of {', '.join(COSTS)}, and so for reference")
        if any(not weight >= 0.0 for weight in self.weights) or not any(weight > 0.0 for weight in self.weights):
            raise ConfigError.of("reward.weights", self.weights, "numbers >= 0, not all zero")

    def of(self, costs: Costs) -> float:
        """The reward. Raises: ConfigError for costs below the reference."""
        known = [place for place, name in enumerate(COSTS) if getattr(costs, name) is not None]
        row = torch.tensor([[getattr(costs, COSTS[place]) for place in known]])
        weights = [self.weights[place] for place in known]
        if self.kind == "sum":
            return -float(weighted_sum(row, weights))
        return -float(chebyshev(row, weights, [self.reference[place] for place in known], self.rho))


def total(parts: Sequence[Costs]) -> Costs:
    """The costs of the whole. Joules are None where a part's are."""
    joules = [part.joules for part in parts]
    known = [value for value in joules if value is not None]
    return Costs(
        sum(part.loss for part in parts),
        sum(part.memory for part in parts),
        sum(part.seconds for part in parts),
        sum(known) if len(known) == len(parts) else None,
    )

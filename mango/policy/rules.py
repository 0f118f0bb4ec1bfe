"""Policies that are rules: a fixed plan, a threshold on captured energy, AdaRankGrad's falling rank. The exact choice is in budget.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mango.errors import ConfigError
from mango.optim.plan import LayerPlan
from mango.policy.base import Observation, Policy


def nearness(policy: Policy, wanted: Tensor) -> Tensor:
    """Scores (n, A) that fall with the distance from the wanted places (n, 3) of rank, bits and moments; a rung of rank counts most."""
    table = torch.tensor(policy.actions.table)  # (A, 3)
    return -((table[None] - wanted[:, None]).abs() * torch.tensor([4.0, 2.0, 1.0])).sum(-1)


@dataclass(eq=False)
class Static(Policy):
    """The same plan for ever: the nearest action to ``plan`` (None = the layer's own) that the budget allows.

    COMP-AMS (arXiv:2205.05632) is such a policy: one compressor for every layer and the whole run, with error feedback.
    """

    plan: LayerPlan | None = None

    def scores(self, seen: Observation) -> Tensor:
        wanted = [self.actions.of(base if self.plan is None else self.plan) for base in seen.bases]
        return nearness(self, torch.tensor([self.actions.table[action] for action in wanted]))


@dataclass(eq=False)
class Uniform(Policy):
    """One action for all layers and the whole run, the largest that the budget allows: COMP-AMS's habit under a budget.

    COMP-AMS (arXiv:2205.05632) compresses every layer alike and keeps the error; AMSGrad's running maximum is no part of a plan.
    """

    def scores(self, seen: Observation) -> Tensor:
        total = seen.nbytes.sum(0)  # (A,)
        fits = total <= (seen.budget if seen.budget is not None else int(total.max()))
        order = torch.where(fits, total, -total)  # the largest that fits; where none does, the smallest
        wanted = torch.tensor(self.actions.table[int(order.argmax())])
        return nearness(self, wanted.expand(len(seen.names), 3))


@dataclass(eq=False)
class Heuristic(Policy):
    """A smaller rank where the basis captures more than ``high`` of the gradient's energy, a larger one where less than ``low``.

    Bits stay as they are. What the budget does not allow is cut where it costs the fewest rungs.
    """

    low: float = 0.5
    high: float = 0.8

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ConfigError.of("low, high", (self.low, self.high), "0 <= low < high <= 1")

    def moved(self, seen: Observation) -> Tensor:
        """(n,) rungs of rank to go: 1, 0 or -1."""
        energy, observed = seen.layer("energy"), seen.layer("observed") > 0
        return ((energy < self.low).long() - (energy > self.high).long()) * observed

    def scores(self, seen: Observation) -> Tensor:
        wanted = torch.tensor([self.actions.table[action] for action in seen.current])
        wanted[:, 0] = (wanted[:, 0] + self.moved(seen)).clamp(0, len(self.actions.ranks) - 1)
        return nearness(self, wanted)


@dataclass(eq=False)
class RankSchedule(Heuristic):
    """AdaRankGrad's schedule (arXiv:2410.17881): the rank starts large and falls, never rises, while the basis holds the share ``high``.

    Departure: the paper measures the spectrum to choose the new rank at once; here it falls one rung a decision, by the captured energy.
    """

    low: float = 0.0
    high: float = 0.6

    def moved(self, seen: Observation) -> Tensor:
        down = super().moved(seen).clamp(max=0)
        first = seen.layer("observed") == 0
        return torch.where(first, len(self.actions.ranks), down)

"""Who is imitated and who sets the mark: rules, and the greedy oracle that tries every plan for a step."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch

from mango.policy.actions import choose
from mango.policy.base import Observation, Policy
from mango.policy.environment import TrainingRun
from mango.policy.rewards import Costs

Expert = Callable[[TrainingRun, Observation], list[int]]


def follow(policy: Policy) -> Expert:
    """A policy as an expert."""
    return lambda run, seen: policy.decide(seen)


class Oracle:
    """Tries, for each layer, each rank, each number of bits and each precision of the moments for ``steps`` steps of the run itself, from
    where it stands and on the batches that come, takes everything back, and chooses what earned most within the budget.

    Dials are tried one at a time and their gains added, as trying all actions would take several times as long as the run. The gain is the
    reward's, with the loss of the trial's steps counted as often as they fit an interval; times are too short to measure and do not count.

    Args:
        steps: of a trial.
    """

    def __init__(self, steps: int = 2) -> None:
        self.steps = steps

    def __call__(self, run: TrainingRun, seen: Observation) -> list[int]:
        actions, reward, before = run.actions, run.settings.reward, run.snapshot()
        scores = torch.zeros(len(seen.names), len(actions), dtype=torch.float64)
        plans = run.optimizer.plans()
        for layer, (name, current) in enumerate(zip(seen.names, seen.current, strict=True)):
            places = actions.table[current]
            gains: list[list[float]] = []
            for dial, options in enumerate((actions.ranks, actions.bits, actions.moments)):
                gains.append([])
                for option in range(len(options)):
                    tried = list(places)
                    tried[dial] = option
                    rank, bits, moments = tried
                    run.optimizer.set_plan(name, actions.plan(actions.table.index((rank, bits, moments)), seen.bases[layer]))
                    run.train(self.steps)
                    gains[dial].append(-log(run.evaluate()))
                    run.restore(before)
                    run.optimizer.set_plan(name, plans[name])
            for action, (rank, bits, moments) in enumerate(actions.table):
                progress = (gains[0][rank] + gains[1][bits] + gains[2][moments]) * run.settings.every / self.steps
                memory = int(seen.nbytes[layer, action]) / (8 * run.values) / run.settings.decisions
                scores[layer, action] = reward.of(Costs(-progress, memory, 0.0)) if reward.kind == "sum" else progress - memory
        return choose(scores, seen.nbytes, seen.allowed, seen.budget)

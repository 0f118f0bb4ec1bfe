"""Who is imitated and who sets the mark: rules, and the greedy oracle that tries every plan for a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, log
from typing import Any

import torch
from torch import Tensor

from mango.errors import ConfigError
from mango.optim.plan import LayerPlan
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
    where it stands and on batches drawn for the trial, takes everything back, and chooses what earned most within the budget.

    Dials are tried one at a time and their gains added, as trying all actions would take several times as long as the run. A gain is the
    difference to what the plan in force earns with the same batches and the same held-out examples. A plan is taken only if it earned
    more than the one in force by ``deviations`` standard errors of that difference: what is left to chance cannot be imitated, nor is it
    worth anything. Chance has two parts, the examples and, of which there must be several for that, the batches: a difference that is
    there on every example may be there on one batch alone. A trial's progress counts as often as its steps fit an interval; times are
    too short to measure and do not count.

    Args:
        steps: of a trial.
        draws: trials of each plan, on other batches than those that come, at least 2.
        examples: held out, that its loss is measured on, at least 2.
        deviations: standard errors within which two plans tie, and the one in force stays.

    Raises: ConfigError for numbers that are not legal.
    """

    def __init__(self, steps: int = 1, draws: int = 4, examples: int = 48, deviations: float = 3.0) -> None:
        for name, value, least in (("steps", steps, 1), ("draws", draws, 2), ("examples", examples, 2)):
            if value < least:
                raise ConfigError.of(f"oracle.{name}", value, f"an integer >= {least}")
        self.steps, self.draws, self.examples, self.deviations = steps, draws, examples, deviations

    def __call__(self, run: TrainingRun, seen: Observation) -> list[int]:
        actions, before = run.actions, run.snapshot()
        same = self._losses(run, before, {})
        scores = torch.full((len(seen.names), len(actions)), -inf, dtype=torch.float64)
        for layer, (name, current) in enumerate(zip(seen.names, seen.current, strict=True)):
            places, held = actions.table[current], int(seen.nbytes[layer, current])
            gains: list[list[float]] = []  # of progress, by dial and option; -inf = not taken
            for dial, options in enumerate((actions.ranks, actions.bits, actions.moments)):
                gains.append([-inf] * len(options))
                for option in range(len(options)):
                    tried = list(places)
                    tried[dial] = option
                    rank, bits, moments = tried
                    action = actions.table.index((rank, bits, moments))
                    if action == current:
                        gains[dial][option] = 0.0
                    elif seen.allowed[layer, action]:
                        other = self._losses(run, before, {name: actions.plan(action, seen.bases[layer])})
                        gain, noise = self._gain(run, same, other)
                        if worth(run, gain - self.deviations * noise, int(seen.nbytes[layer, action])) > worth(run, 0.0, held):
                            gains[dial][option] = gain
            for action, (rank, bits, moments) in enumerate(actions.table):
                progress = gains[0][rank] + gains[1][bits] + gains[2][moments]
                if progress > -inf:
                    scores[layer, action] = worth(run, progress, int(seen.nbytes[layer, action]))
        return choose(scores, seen.nbytes, seen.allowed & scores.isfinite(), seen.budget)

    def _losses(self, run: TrainingRun, before: Any, changed: Mapping[str, LayerPlan]) -> Tensor:  # (draws, examples)
        """After trials from ``before``, where the run stands and to which it goes back, with some plans changed."""
        found = []
        for draw in range(1, self.draws + 1):
            for name, plan in changed.items():
                run.optimizer.set_plan(name, plan)
            run.train(self.steps, draw=draw)
            found.append(run.losses(self.examples).double())
            run.restore(before)
        return torch.stack(found)

    def _gain(self, run: TrainingRun, same: Tensor, other: Tensor) -> tuple[float, float]:
        """By how much more an interval lowers the logarithm of the mean loss, and the standard error of that."""
        differences, intervals = same - other, run.settings.every / self.steps
        noise = sum(float(differences.mean(axis).var()) / differences.shape[1 - axis] for axis in (0, 1)) ** 0.5 / float(same.mean())
        return intervals * log(float(same.mean()) / float(other.mean())), intervals * noise


def worth(run: TrainingRun, progress: float, nbytes: int) -> float:
    """What an interval earns with a layer's progress and bytes."""
    reward, memory = run.settings.reward, nbytes / (8 * run.values) / run.settings.decisions
    return reward.of(Costs(-progress, memory, 0.0)) if reward.kind == "sum" else progress - memory

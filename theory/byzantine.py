"""The Byzantine experiment of T6: 8 workers, 2 of them hostile, every attack against every aggregator on the logistic task."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from mango import compressors
from mango.feedback import ByzVRMarina, aggregators, attacks
from mango.feedback.aggregators import Aggregator
from mango.feedback.attacks import Attack
from theory.base import Case
from theory.problems import Logistic, breast_cancer

WORKERS, HOSTILE = 8, 2
STEPS, BATCH, PROBABILITY, KEPT = 150, 32, 0.2, 10
WITHIN = 10.0  # times the attack-free gradient norm
CEILING = 1e6  # a run whose gradient norm exceeds this, or is not finite, has diverged


@dataclass(frozen=True)
class Run:
    """Norms of the honest workers' mean gradient at x_0, x_1, ...; shorter than STEPS + 1 when it diverged."""

    norms: list[float]
    dropped: int

    @property
    def diverged(self) -> bool:
        return len(self.norms) <= STEPS

    @property
    def last(self) -> float:
        return self.norms[-1]

    @property
    def outcome(self) -> float:
        """The last norm; at least CEILING for a run that diverged, whose last point need not be finite."""
        return max(self.last, CEILING) if self.diverged else self.last


def run(aggregator: Aggregator, attack: Attack | None, seed: int, *, hostile: int = HOSTILE) -> Run:
    """Byz-VR-MARINA with gamma = 1/(2L) on the homogeneous task (zeta = 0), where nothing but the attack stands between x and a minimum.

    Without an attack the honest workers run alone.
    """
    good = WORKERS - hostile
    task = breast_cancer(WORKERS, homogeneous=True)
    honest = Logistic(task.features[:good], task.labels[:good], task.lam)
    if attack is not None:
        labels = torch.cat([task.labels[:good], attack.labels(task.labels[good:])])
        task = Logistic(task.features, labels, task.lam)
    else:
        task = honest
    method = ByzVRMarina(compressors.RandK(k=KEPT), PROBABILITY, aggregator, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x, previous = torch.zeros(task.dim, dtype=torch.float64), torch.zeros(task.dim, dtype=torch.float64)
    norms = []
    for step in range(STEPS + 1):
        norm = float(honest.gradient(x).norm())
        if isfinite(norm):
            norms.append(norm)
        if not norm <= CEILING or step == STEPS:
            break
        if method.full:
            estimate = method.step(list(task.gradients(x)), attack=attack)
        else:
            index = torch.randint(task.labels.shape[1], (task.workers, BATCH), generator=generator)
            estimate = method.step(list(task.sampled(x, index)), list(task.sampled(previous, index)), attack=attack)
        assert isinstance(estimate, Tensor)
        previous, x = x, x - estimate / (2 * task.L)
    return Run(norms, aggregator.dropped)


def measure(seed: int) -> tuple[list[Case], list[Case], dict[str, Any]]:
    """A case for each robust aggregator (its worst attack), the controls (the mean; a hostile majority), and the curves."""
    free = run(aggregators.Mean(), None, seed)
    runs = {
        name: {a: run(aggregators.get(name), attacks.get(a, attackers=HOSTILE), seed) for a in attacks.REGISTRY}
        for name in aggregators.REGISTRY
    }
    cases = []
    for name, by_attack in runs.items():
        if aggregators.REGISTRY.load(name).robust:
            worst = max(by_attack, key=lambda attack: by_attack[attack].outcome)
            cases.append(
                Case(f"{name} under its worst attack ({worst}): |grad f| / attack-free", WITHIN, by_attack[worst].outcome / free.last)
            )
    mildest = min(runs["mean"], key=lambda attack: runs["mean"][attack].outcome)
    majority = run(aggregators.CoordinateMedian(delta=0.49), attacks.SignFlip(attackers=5, scale=1.0), seed, hostile=5)
    controls = [
        Case(f"plain mean under its mildest attack ({mildest}): |grad f| / attack-free", WITHIN, runs["mean"][mildest].outcome / free.last),
        Case("median with 5 of 8 hostile (signflip): |grad f| / attack-free", WITHIN, majority.outcome / free.last),
    ]
    every = max(1, STEPS // 100)
    curves = {
        name: {
            attack: {"norms": r.norms[::every], "diverged": r.diverged, "dropped": r.dropped, "last": r.last} for attack, r in by.items()
        }
        for name, by in runs.items()
    }
    return cases, controls, {"every": every, "attack_free": free.norms[::every], "aggregators": curves}

"""What every policy sees, answers and declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mango.feedback import rates
from mango.optim.plan import LayerPlan
from mango.policy.actions import Actions, Shape, certified, choose

# Of a layer's last observed step. A layer that has not been observed yet has zeros, and ``observed`` says so.
LAYER = (
    "observed",  # 1 or 0
    "log_norm",  # of the gradient, natural logarithm
    "variance",  # 1 - ‖M‖²/‖√V‖² of the corrected moments: near 1 where gradients disagree from step to step
    "cosine",  # between the momentum and the gradient, in the basis
    "energy",  # share of ‖H‖² that the basis captures
    "drift",  # mean cosine of the principal angles between the last two bases
    "error_ratio",  # ‖E‖/‖G‖ minus one, above it its natural logarithm
    "rank",  # of the plan in force: binary logarithm of its share of the smaller dimension
    "bits",  # of basis and factor, over 16
    "moments",  # bits, over 16
    "size",  # natural logarithm of the number of values
    "aspect",  # natural logarithm of larger over smaller dimension
    "depth",  # 0 for the first layer to 1 for the last
    "convolution",  # 1 or 0, and so on
    "experts",
)
# Of the run. What its owner does not tell is 0, and its flag says so.
WORLD = (
    "told_loss",
    "loss_slope",  # natural logarithm of the loss now over that at the decision before
    "told_progress",
    "progress",  # 0 to 1
    "has_budget",
    "used",  # bytes of state over the budget
    "budget",  # natural logarithm of the budget's bytes for each value
    "told_seconds",
    "seconds",  # natural logarithm of a step's time over that of the first decision's steps
    "told_watts",
    "watts",  # natural logarithm
)


@dataclass(frozen=True)
class Observation:
    """One decision's view: a token for each layer and one for the run.

    Attributes:
        names, shapes: of the n layers.
        layers: (n, len(LAYER)) float32.
        world: (len(WORLD),) float32.
        bases: each layer's own plan, whose other fields an action leaves alone.
        current: the action in force for each layer, or the nearest one.
        nbytes: (n, A) int64, of state under each action.
        allowed: (n, A) bool.
        budget: bytes that the layers may hold together; None = no limit.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layers: Tensor
    world: Tensor
    bases: tuple[LayerPlan, ...]
    current: tuple[int, ...]
    nbytes: Tensor
    allowed: Tensor
    budget: int | None = None

    def layer(self, feature: str) -> Tensor:
        """(n,) one feature of every layer."""
        return self.layers[:, LAYER.index(feature)]

    def permuted(self, order: Sequence[int]) -> Observation:
        """The same with the layers in another order; depths stay with their layers."""
        places = list(order)
        rows: dict[str, Any] = {key: getattr(self, key)[places] for key in ("layers", "nbytes", "allowed")}
        for key in ("names", "shapes", "bases", "current"):
            rows[key] = tuple(getattr(self, key)[place] for place in places)
        return replace(self, **rows)


@dataclass(eq=False)
class Policy(ABC):
    """Scores every action of every layer; the choice within the budget is the same for all policies.

    A policy looks at what happened before the step that it decides about, so T7 (1) holds with ``alpha_min``.

    Args:
        actions: what it may choose.
    """

    equivariant: ClassVar[bool] = True  # whatever the order in which layers are listed, each gets the same

    actions: Actions = field(default_factory=Actions, kw_only=True)

    @abstractmethod
    def scores(self, seen: Observation) -> Tensor:
        """(n, A) preferences, larger is better; what the mask forbids is never taken."""

    def decide(self, seen: Observation) -> list[int]:
        """An action for each layer, within the budget. Raises: ConfigError when the smallest plans exceed it."""
        return choose(self.scores(seen), seen.nbytes, seen.allowed, seen.budget)

    def alpha_min(self, shapes: Sequence[Shape], base: LayerPlan = LayerPlan()) -> float:  # noqa: B008  (frozen)
        """The contraction that every plan this policy may choose is certified for, in every one of these layers."""
        return min(self.actions.alpha_min(shape, base) for shape in shapes)


@dataclass(frozen=True)
class StepCondition:
    """T7 for the plans that a run had, for L = 1: largest step sizes of EF21, with L_tilde = L.

    Attributes:
        alpha_min: the policy's declaration.
        least: the least contraction of the run.
        step_declared: by T7 (1), with ``alpha_min``.
        step_schedule: by T7 (2), for the sequence as it was (known only afterwards, as w looks forward).
    """

    alpha_min: float
    least: float
    step_declared: float
    step_schedule: float


def step_condition(
    alpha_min: float, shapes: Sequence[Shape], history: Sequence[tuple[int, Sequence[LayerPlan]]], steps: int
) -> StepCondition:
    """What T7 says of a run.

    The gradient as a whole is compressed layer by layer, so it contracts as the worst layer does.

    Args:
        alpha_min: the policy's declaration.
        history: (step, plan of each layer) from step 0 on, at each step from which new plans held.
        steps: of the run, at least 1.
    """
    marks = [(step, min(certified(shape, plan) for shape, plan in zip(shapes, plans, strict=True))) for step, plans in history]
    ends = [step for step, _ in marks[1:]] + [steps]
    alphas = [alpha for (step, alpha), end in zip(marks, ends, strict=True) for _ in range(end - step)]
    found = rates.schedule(alphas)
    return StepCondition(alpha_min, min(alphas), rates.ef21(alpha_min).step(1.0, 1.0), found.step(1.0, 1.0))


def flags(values: dict[str, float | None]) -> Tensor:
    """The world token from what is known; None and what is absent are not told."""
    told = {"loss_slope": "told_loss", "progress": "told_progress", "used": "has_budget", "seconds": "told_seconds", "watts": "told_watts"}
    row = {name: float(value) for name, value in values.items() if value is not None}
    row |= {flag: 1.0 for name, flag in told.items() if name in row}
    return torch.tensor([row.get(name, 0.0) for name in WORLD])

"""A policy at work inside an optimizer: it is asked every so many steps, and its answer becomes the plans of the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import log
from typing import TYPE_CHECKING, Any

import torch

from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes
from mango.optim.plan import LayerPlan
from mango.policy.actions import check
from mango.policy.base import Observation, Policy
from mango.policy.observe import Diagnostics, observe

if TYPE_CHECKING:
    from mango.optim.mango import Mango

SIGNALS = ("loss", "progress", "seconds", "watts")


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Inside, tensors are made on the CPU in float32, as policies expect, whatever a script has made torch's defaults."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


class Controller:
    """Asks a policy before the first step and after every ``every``-th; whatever it answers, the budget holds.

    Only matrices that have a plan of their own are its business. What must be remembered from one decision to the next is a few numbers in
    the first parameter group ("policy"), so that a checkpoint keeps them.

    Args:
        policy: whom it asks.
        every: steps between two decisions, at least 1.
        budget: bytes of ``optimizer.nbytes()``; None = no limit.

    Attributes:
        signals: what the owner of the run has told (see ``Mango.signal``).
        seen: the observation of the last decision.
        watching: whether the step that comes now is to be observed.

    Raises: ConfigError for a number of steps that is not legal.
    """

    def __init__(self, policy: Policy, every: int, budget: int | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError.of("policy_every", every, "an integer >= 1")
        self.policy, self.every, self.limit = policy, every, budget
        self.budget: int | None = None  # what the layers may hold
        self.layers: dict[str, LayerPlan] = {}  # each layer's own plan
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.signals: dict[str, float] = {}
        self.seen: Observation | None = None
        self.watching = False

    def adopt(self, optimizer: Mango) -> None:
        """Take charge of the optimizer's matrices, and decide for the first time.

        Raises: ConfigError when there is no matrix to decide about, or not even the smallest plans keep the budget.
        """
        self.layers = {name: plan for name, plan in optimizer.own_plans().items() if plan is not None}
        if not self.layers:
            raise ConfigError.of("policy", type(self.policy).__name__, "None: there is no matrix with a plan to decide about")
        shapes = optimizer.shapes()
        self.shapes = {name: shapes[name] for name in self.layers}
        spent = sum(layer_nbytes(shape, None) for name, shape in shapes.items() if name not in self.layers)
        if self.limit is not None:
            self.budget = self.limit - spent
            least = sum(min(self.policy.actions.nbytes(shape, self.layers[name])) for name, shape in self.shapes.items())
            if least > self.budget:
                legal = f"at least {spent + least} bytes, of which {spent} for tensors that keep plain AdamW"
                raise ConfigError.of("memory_budget", self.limit, legal)
        self._decide(optimizer, {})
        self.watching = self.every == 1

    def stepped(self, optimizer: Mango, step: int) -> None:
        """Step number ``step`` is done: decide if it is time, and watch the next step if that one will be followed by a decision."""
        if step % self.every == 0:
            self._decide(optimizer, optimizer.diagnostics())
        self.watching = (step + 1) % self.every == 0

    def look(self, optimizer: Mango, diagnostics: Diagnostics, world: Mapping[str, float | None]) -> Observation:
        """What the policy would see now."""
        now = optimizer.plans()
        layers = {name: (self.shapes[name], base, now[name] or base) for name, base in self.layers.items()}
        return observe(self.policy.actions, layers, diagnostics, world, self.budget)

    def apply(self, optimizer: Mango, seen: Observation, choice: list[int]) -> None:
        """Make actions the plans; layers that shrink come first, so that the budget holds at every moment.

        Raises: ConfigError for an action outside its mask or a choice above the budget.
        """
        check(choice, seen.nbytes, seen.allowed, seen.budget)
        now, growth = optimizer.plans(), {}
        plans = {name: self.policy.actions.plan(action, base) for name, action, base in zip(seen.names, choice, seen.bases, strict=True)}
        for name, plan in plans.items():
            if plan != now[name]:
                growth[name] = layer_nbytes(self.shapes[name], plan) - layer_nbytes(self.shapes[name], now[name])
        for name in sorted(growth, key=growth.__getitem__):
            optimizer.set_plan(name, plans[name])

    def _decide(self, optimizer: Mango, diagnostics: Diagnostics) -> None:
        with torch_defaults():
            self.seen = self.look(optimizer, diagnostics, self._world(optimizer.param_groups[0]))
            choice = self.policy.decide(self.seen)
        self.apply(optimizer, self.seen, choice)

    def _world(self, group: dict[str, Any]) -> dict[str, float | None]:
        """The signals as features; what the next decision compares them with is kept in the group."""
        kept: dict[str, float] = dict(group.get("policy", {}))
        loss, seconds, watts = (self.signals.get(key) for key in ("loss", "seconds", "watts"))
        world: dict[str, float | None] = {"progress": self.signals.get("progress")}
        if loss:
            world["loss_slope"] = log(loss / kept.get("loss", loss))
            kept["loss"] = loss
        if seconds:
            kept.setdefault("seconds", seconds)
            world["seconds"] = log(seconds / kept["seconds"])
        if watts:
            world["watts"] = log(watts)
        group["policy"] = kept
        return world

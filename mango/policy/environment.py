"""Short real training runs as an environment: a decision, some steps of Mango, what they cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import log, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mango import data as datasets
from mango import models
from mango.data.base import Dataset
from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes
from mango.optim.mango import Mango
from mango.optim.plan import LayerPlan
from mango.optim.split import split
from mango.policy.actions import Actions
from mango.policy.base import Observation
from mango.policy.controller import Controller
from mango.policy.evaluate import hutchpp
from mango.policy.rewards import Costs, Reward, total
from mango.policy.rules import Static
from mango.telemetry import PowerSampler

TRACED = 32  # examples for the Hessian, whose products cost several passes each
DRAWS = 1_000_003  # between the seeds of two draws of batches
PLAN = LayerPlan(error_decay=0.9, power="full", caution=0.0)  # fields as they were when the shipped policies were trained
LOSS_CEILING = 20.0  # a run whose loss is above it, or not finite, has diverged and counts as this


@dataclass(frozen=True)
class Task:
    """What is trained: a model of mango.models on a data set of mango.data, at one rate.

    Attributes:
        name: for records.
        data, model: their names and arguments, as in a tier's settings.
        lr: of Mango, cosine to zero.
        batch: examples. exclude: matrices that are not under test.
    """

    name: str
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    lr: float
    batch: int = 32
    exclude: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True)
class Settings:
    """How long an episode is, and what it pays for.

    Attributes:
        decisions: in an episode. every: steps between two. evaluate: examples that the loss is measured on.
        told: share of the episodes in which the policy is told seconds and watts, so that it learns to do without.
        error: how Mango keeps the error, the same for all actions.
    """

    decisions: int = 6
    every: int = 10
    evaluate: int = 128
    told: float = 0.5
    error: str = "codec"
    reward: Reward = field(default_factory=Reward)

    def __post_init__(self) -> None:
        for name in ("decisions", "every", "evaluate"):
            if not getattr(self, name) >= 1:
                raise ConfigError.of(f"settings.{name}", getattr(self, name), "an integer >= 1")


class TrainingRun:
    """One episode. Everything but time and energy is a function of the arguments.

    Seconds are processor time of this thread: on an idle machine they are the wall time of these single-threaded steps, and on a busy one
    they do not grow with what other processes do.

    Args:
        task: what is trained.
        budget: bytes of state for each value of the matrices under test; None = no limit.
        seed: of initialisation, batches and scouts.
        settings: of the episode.
        actions: what may be chosen.
        power: a running sampler; None = joules are not measured.
    """

    def __init__(
        self,
        task: Task,
        budget: float | None,
        seed: int,
        settings: Settings | None = None,
        actions: Actions | None = None,
        power: PowerSampler | None = None,
    ) -> None:
        self.task, self.budget, self.seed = task, budget, seed
        self.settings, self.actions, self.power = settings or Settings(), actions or Actions(), power
        self.costs: list[Costs] = []
        self.vectors: list[Tensor] = []
        self.history: list[tuple[int, list[LayerPlan]]] = []

    def reset(self) -> Observation:
        task, settings = self.task, self.settings
        self.data = _data(task)
        self.model, self.optimizer = _build(task, self.seed, replace(PLAN, error=settings.error))
        warm_up(task, self.actions, settings.error)
        self.dense = dense_seconds(task, settings.every) * settings.decisions
        limit = None
        if self.budget is not None:
            shapes, plans = self.optimizer.shapes(), self.optimizer.own_plans()
            limit = sum(
                int(self.budget * prod(shape)) if plans.get(name) is not None else layer_nbytes(shape, None)
                for name, shape in shapes.items()
            )
        self.controller = Controller(Static(actions=self.actions), settings.every, limit)
        self.controller.adopt(self.optimizer)
        self.values = sum(map(prod, self.controller.shapes.values()))
        self.tell = bool(torch.rand((), generator=torch.Generator().manual_seed(self.seed)) < settings.told)
        self.decisions = 0
        self.first = self.loss = self.evaluate()
        self.costs, self.history = [], []
        self.seen = self.controller.look(self.optimizer, {}, {"progress": 0.0, "loss_slope": 0.0})
        return self.seen

    def step(self, choice: Sequence[int]) -> tuple[Observation, float, bool]:
        """Follow a choice for ``every`` steps. Raises: ConfigError for one outside the mask or above the budget."""
        self.controller.apply(self.optimizer, self.seen, list(choice))
        self.history.append((self.decisions * self.settings.every, [plan for plan in self.optimizer.plans().values() if plan is not None]))
        moment, begin = time.monotonic(), time.thread_time()
        self.train(self.settings.every, observe=True)
        seconds = time.thread_time() - begin
        joules = self._joules(moment)
        before, self.loss = self.loss, self.evaluate()
        self.decisions += 1
        nbytes = sum(int(self.seen.nbytes[place, action]) for place, action in enumerate(choice))
        memory = nbytes / (8 * self.values) / self.settings.decisions
        self.costs.append(Costs(log(self.loss / before), memory, seconds / self.dense, joules))
        self.seen = self.controller.look(self.optimizer, self.optimizer.diagnostics(), self._world(before, seconds, joules))
        return self.seen, self.settings.reward.of(self.costs[-1]), self.decisions == self.settings.decisions

    def train(self, steps: int, observe: bool = False, draw: int = 0) -> None:
        """Steps of the run, from where it stands, on the batches that come or, for a draw other than 0, on others."""
        every = self.settings.every
        length = every * self.settings.decisions
        for _ in range(steps):
            step = self.optimizer._steps()
            for group in self.optimizer.param_groups:
                group["lr"] = self.task.lr * max(0.05, 1.0 - step / length)
            inputs, targets = self.data.batch(step, self.task.batch, self.seed + draw * DRAWS)
            self.model.train()
            loss = _loss(self.model, inputs, targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.observe(observe and (step + 1) % every == 0)
            self.optimizer.step()

    def evaluate(self) -> float:
        """The loss on held-out examples, always the same ones."""
        return float(self.losses(self.settings.evaluate).mean())

    @torch.no_grad()
    def losses(self, examples: int) -> Tensor:
        """(examples,) of the first so many held-out ones; what has diverged counts as ``LOSS_CEILING``."""
        self.model.eval()
        inputs, targets = next(iter(self.data.evaluation("test", examples)))
        found = _losses(self.model, inputs, targets).flatten().unflatten(0, (len(inputs), -1)).mean(1)
        return found.nan_to_num(LOSS_CEILING).clamp(max=LOSS_CEILING)

    def result(self) -> Costs:
        """Of the whole run."""
        return total(self.costs)

    def traces(self, queries: int = 6) -> list[float]:
        """The trace of the loss's Hessian for each layer, on some held-out examples, by Hutch++."""
        self.model.eval()
        inputs, targets = next(iter(self.data.evaluation("test", min(TRACED, self.settings.evaluate))))
        named = dict(self.model.named_parameters())
        layers = [named[name] for name in self.controller.shapes]
        with torch.enable_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):  # the others have no second derivative
            gradients = torch.autograd.grad(_loss(self.model, inputs, targets), layers, create_graph=True)
            found = []
            for layer, gradient in zip(layers, gradients, strict=True):

                def product(x: Tensor, layer: Tensor = layer, gradient: Tensor = gradient) -> Tensor:
                    columns = [
                        torch.autograd.grad(gradient, layer, x[:, k].view_as(layer), retain_graph=True)[0] for k in range(x.shape[1])
                    ]
                    return torch.stack([column.flatten() for column in columns], dim=1)

                found.append(hutchpp(product, layer.numel(), queries, torch.Generator().manual_seed(self.seed)))
        return found

    def snapshot(self) -> tuple[Any, Any]:
        """Model and optimizer as they are; a copy."""
        return copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())

    def restore(self, snapshot: tuple[Any, Any]) -> None:
        """Back to a snapshot."""
        self.model.load_state_dict(snapshot[0])
        self.optimizer.load_state_dict(snapshot[1])

    def _world(self, before: float, seconds: float, joules: float | None) -> dict[str, float | None]:
        world: dict[str, float | None] = {"progress": self.decisions / self.settings.decisions, "loss_slope": log(self.loss / before)}
        if self.tell:
            world["seconds"] = log(max(seconds, 1e-9) / (self.dense / self.settings.decisions))
            watts = None if self.power is None else self.power.watts
            world["watts"] = log(watts) if watts else None
        return world

    def _joules(self, begin: float) -> float | None:
        """Of this interval, over the whole run's under dense AdamW, whose power is taken to be the same: joules per dense second."""
        if self.power is None:
            return None
        self.power.sample()
        used, watts = self.power.energy(begin, time.monotonic()), self.power.watts
        return None if used is None or not watts else used / (watts * self.dense)


def _losses(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of every target, in their order."""
    return functional.cross_entropy(model(inputs.contiguous()).flatten(0, -2).float(), targets.flatten(), reduction="none")


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return _losses(model, inputs, targets).mean()


@cache
def _data(task: Task) -> Dataset:
    return datasets.load(**task.data)


def _build(task: Task, seed: int, plan: LayerPlan) -> tuple[nn.Module, Mango]:
    torch.manual_seed(seed)
    arguments = {key: value for key, value in task.model.items() if key != "name"}
    model = models.get(task.model["name"], **_data(task).model_arguments(), **arguments)
    matrices, rest = split(model, task.exclude)
    if not matrices:
        raise ConfigError.of("task", task.name, "a model with a matrix of at least 4096 values that is not excluded")
    groups: list[dict[str, Any]] = [{"params": matrices, "plan": plan}, {"params": rest, "plan": None}]
    return model, Mango([group for group in groups if group["params"]], lr=task.lr, seed=seed, matmul="float32")


@cache
def warm_up(task: Task, actions: Actions, error: str) -> None:
    """A step under every pair of precisions: compiled loops load when they are first called, and no run's seconds should hold that."""
    model, optimizer = _build(task, 0, replace(PLAN, error=error))
    own = {name: plan for name, plan in optimizer.own_plans().items() if plan is not None}
    for action, (rank, _, _) in enumerate(actions.table):
        if rank == 0:
            for name, plan in own.items():
                optimizer.set_plan(name, actions.plan(action, plan))
            optimizer.zero_grad()
            _loss(model, *_data(task).batch(0, task.batch, 0)).backward()
            optimizer.observe(True)
            optimizer.step()


@cache
def dense_seconds(task: Task, steps: int) -> float:
    """Processor seconds of so many steps under torch's AdamW: what times are given in. The quickest of three, after a warm-up."""
    torch.manual_seed(0)
    data = _data(task)
    model = models.get(task.model["name"], **data.model_arguments(), **{k: v for k, v in task.model.items() if k != "name"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)
    found = []
    for _ in range(4):
        begin = time.thread_time()
        for step in range(steps):
            optimizer.zero_grad()
            _loss(model, *data.batch(step, task.batch, 0)).backward()
            optimizer.step()
        found.append(time.thread_time() - begin)
    return min(found[1:])

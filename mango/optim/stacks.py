"""A step's work, sorted: what plain AdamW steps, and stacks of same-shaped matrices with one plan, each stepped at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mango import codecs, native
from mango.codecs.fourbit import FourBit
from mango.optim import lanes
from mango.optim.adamw import step_group
from mango.optim.layers import STACK_VALUES, Hyper, LayerStack
from mango.optim.plan import LARGE, LayerPlan, matrix_count, matrix_shape
from mango.products import in_halves, without_autocast
from mango.workspace import Workspace

Scratch = dict[tuple[torch.device, int], Workspace]  # by device and lane
State = MutableMapping[Tensor, dict[str, Any]]  # of an optimizer, by parameter
ROUGH = 4  # times STACK_VALUES: bfloat16 of so many take 32 MiB, and a step of fewer, larger stacks a tenth less time
HOLDS = ("cpu",)  # devices on which scratch memory is held between steps; others have allocators that give it back at no cost


class Place(NamedTuple):
    """Where a parameter stands: its group, its name for messages, and its number, which never changes."""

    group: dict[str, Any]
    name: str
    number: int
    plan: LayerPlan | None  # in force; None = plain AdamW


@dataclass(slots=True)
class Item:
    """One parameter in a step."""

    param: Tensor
    grad: Tensor
    place: Place

    def kind(self) -> tuple[Any, ...]:
        """What it has in common with others that may be stepped together with it."""
        return id(self.place.group), self.place.plan, self.param.shape, self.param.dtype, self.param.device

    def names(self) -> list[str]:
        """Of its matrices."""
        each = matrix_count(self.param.shape)
        return [self.place.name] if each == 1 else [f"{self.place.name}[{part}]" for part in range(each)]


class Stacks:
    """The stacks of one optimizer, and the scratch memory that they share: no part of the state, a few times the size of the largest
    matrix, or of a stack where that is more, and as much again where matrices are stepped in lanes. On a card it is free for activations
    between steps.

    Attributes:
        of: parameter -> the stack that its state is a view of; built anew from the state when absent.
        scratch: the memory; that of others may be given.
    """

    def __init__(self, scratch: Scratch | None = None) -> None:
        self.of: dict[Tensor, LayerStack] = {}
        self.scratch: Scratch = {} if scratch is None else scratch

    def step(self, items: Sequence[Item], states: State, watching: bool) -> dict[str, dict[str, float]]:
        """Step these parameters. Returns the diagnostics by name, when they are watched.

        Args:
            items: parameters with their gradients.
            states: the optimizer's, in which new states are made.
            watching: whether diagnostics are wanted.
        """
        small: dict[tuple[Any, ...], list[Item]] = {}
        large: dict[tuple[Any, ...], list[Item]] = {}
        for item in items:
            param, place = item.param, item.place
            if place.plan is None:
                small.setdefault((id(place.group), param.device), []).append(item)
            else:
                large.setdefault((*item.kind(), states[param].get("step", 0)), []).append(item)
        found: dict[str, dict[str, float]] = {}
        for same in small.values():
            step_group(same[0].place.group, [item.param for item in same], [item.grad for item in same], states)
        for beside, stacks in divided(large.values()):
            steps = [self.job(items, states, watching) for items in stacks]
            for part in lanes.run(steps, [values(items) for items in stacks], beside):
                found |= part
        self.scratch = {place: held for place, held in self.scratch.items() if place[0].type in HOLDS}
        return found

    def job(self, items: list[Item], states: State, watching: bool) -> Callable[[int], dict[str, dict[str, float]]]:
        """What steps these, which are alike, when it is called with the number of a lane."""
        return partial(self._step_stack, self._stack(items, states), items, states, watching)

    def workspace(self, device: torch.device, lane: int) -> Workspace:
        return self.scratch.setdefault((device, lane), Workspace(device))

    def _step_stack(self, stack: LayerStack, items: list[Item], states: State, watching: bool, lane: int) -> dict[str, dict[str, float]]:
        group, params = items[0].place.group, [item.param for item in items]
        for param in params:
            states[param]["step"] += 1
        step = states[params[0]]["step"]
        hyper = Hyper(
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            step=step,
            seeds=[(group["seed"], step, item.place.number, part) for item in items for part in range(matrix_count(item.param.shape))],
            matmul=group["matmul"],
        )
        matrices = [part for item in items for part in as_matrices(item.param)]
        gradients = [part for item in items for part in as_matrices(item.grad)]
        names = [name for item in items for name in item.names()] if watching else None
        with without_autocast(params[0]):  # which reaches no lane but the caller's
            return stack.step(matrices, gradients, hyper, self.workspace(stack.device, lane), names)

    def _stack(self, items: list[Item], states: State) -> LayerStack:
        """The stack whose members are exactly these parameters; formed anew, from their states, when the members changed."""
        first = items[0].param
        each = matrix_count(first.shape)
        stack = self.of.get(first)
        if stack is not None and stack.layers == each * len(items) and all(self.of.get(item.param) is stack for item in items):
            return stack
        shape = matrix_shape(first.shape)
        plan = items[0].place.plan
        assert plan is not None
        stack = LayerStack(plan, shape, each * len(items), first.device, items[0].place.name)
        for number, item in enumerate(items):
            state = states[item.param]
            if state:
                stack.load(number * each, each, state, item.place.name)
            states[item.param] = {"step": state.get("step", 0), **stack.views(number * each, each)}
            self.of[item.param] = stack
        return stack


def values(items: Iterable[Item]) -> int:
    return sum(item.param.numel() for item in items)


def divided(alike: Iterable[list[Item]]) -> Iterator[tuple[int, list[list[Item]]]]:
    """Items as they are stepped, from lists of those that are alike.

    Yields: how many lanes share the stacks, and the items of each.
    """
    groups: dict[int, list[list[Item]]] = {}  # by the number of lanes
    for same in alike:
        param = same[0].param
        groups.setdefault(lanes.count(param.device) if prod(matrix_shape(param.shape)) >= LARGE else 1, []).append(same)
    for beside, lists in groups.items():
        counts = lanes.divide(tuple((len(same), same[0].param.numel(), _most(same[0])) for same in lists), beside)
        yield beside, [list(islice(members, count)) for members, parts in zip(map(iter, lists), counts, strict=True) for count in parts]


def _most(item: Item) -> int:
    """How many like it may be in one stack: more where no more than bfloat16 of them is held together, and little else is.

    Gradients that are read as they lie are converted one at a time, and with an error in four bits H is formed in bfloat16.
    """
    group, plan, device = item.place.group, item.place.plan, item.param.device
    assert plan is not None
    coded = plan.error == "codec" and group["matmul"] != "int8" and isinstance(codecs.get(plan.error_codec), FourBit)
    rough = (
        plan.residual  # without it, what is lifted is wanted whole
        and item.param.dtype == torch.float32
        and native.ready(device)
        and in_halves(matrix_shape(item.param.shape), device, group["matmul"])
        and (coded or (plan.error == "none" and not group["maximize"]))
    )
    return max(1, (ROUGH if rough else 1) * STACK_VALUES // item.param.numel())


def as_matrices(tensor: Tensor) -> list[Tensor]:
    """Views of the matrices."""
    return list(tensor.detach().unbind(0)) if matrix_count(tensor.shape) > 1 else [tensor]

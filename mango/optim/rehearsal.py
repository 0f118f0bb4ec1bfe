"""What would make the first step on a CPU longer than others, done before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from mango.draws import gaussian
from mango.optim import lanes
from mango.optim.stacks import Item, Stacks, divided, values

CPU = torch.device("cpu")


def rehearse(stacks: Stacks, items: Sequence[Item], singly: bool) -> None:
    """Step stand-ins for these matrices as a step would step them: compiled loops are loaded then, or compiled where that is still to be
    done, and scratch memory is there. Nothing else is kept.

    Of stacks that are alike the largest is stepped, once, with one matrix in the place of all of its weights, and one of its gradients.

    Args:
        stacks: whose scratch memory it is.
        items: matrices on the CPU; their gradients are not looked at.
        singly: whether each will be stepped by itself.
    """
    alike: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        alike.setdefault(item.kind(), []).append(item)
    threads = torch.get_num_threads()
    for part in [[same[:1]] for same in alike.values()] if singly else [list(alike.values())]:
        for beside, members in divided(part):
            members.sort(key=values, reverse=True)
            alone = lanes.alone(tuple(map(values, members)), beside)
            _step(stacks, members[:alone], 0, threads)
            if members[alone:]:
                last = beside - 1
                _step(stacks, members[alone:], last, threads // beside)
                for lane in range(last):
                    stacks.workspace(CPU, lane).match(stacks.workspace(CPU, last))


def _step(stacks: Stacks, members: list[list[Item]], lane: int, threads: int) -> None:
    """Step stand-ins for the members of these stacks, which are sorted by size, on so many threads."""
    kinds = {items[0].kind(): items for items in reversed(members)}  # of each the largest
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for items in kinds.values():
            like = items[0].param
            weights, grad = torch.zeros_like(like), gaussian(like.shape, (0,)).to(like.dtype)
            stand_ins = [Item(weights.view_as(weights), grad, item.place) for item in items]  # of one memory
            Stacks(stacks.scratch).job(stand_ins, defaultdict(dict), False)(lane)
    finally:
        torch.set_num_threads(before)

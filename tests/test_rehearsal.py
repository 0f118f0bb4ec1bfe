"""The first step of Mango on a CPU finds what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mango import LayerPlan, Mango
from mango.draws import gaussian
from mango.workspace import Workspace

SHAPES = ((512, 512), (512, 512), (512, 1024), (1024, 512), (96, 64), (8,))  # for lanes, for all threads, and for plain AdamW
FOUND = """
import json, sys, torch
from torch import nn
from mango import Mango
from mango.native import codecs, optim, team

def loaded():
    loops = [loop for room in (codecs, optim) for loop in vars(room).values() if hasattr(loop, "overloads")]
    return sum(len(loop.overloads) for loop in loops) + len(team._entries)

shapes, fused, plan = json.loads(sys.argv[1])
params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
optimizer = Mango(params, lr=1e-3, plan=plan, fuse_backward=fused)
before = loaded()
for _ in range(2):
    sum(param.square().sum() for param in params).backward()
    optimizer.step()
print(before, loaded())
"""


def matrices() -> list[nn.Parameter]:
    return [nn.Parameter(gaussian(shape, (place,)) / 32) for place, shape in enumerate(SHAPES)]


def push(optimizer: Mango, params: list[nn.Parameter], step: int) -> None:
    for place, param in enumerate(params):
        param.grad = gaussian(param.shape, (step, place))
    optimizer.step()


def held(optimizer: Mango) -> dict[Any, int]:
    """Where each piece of scratch memory lies."""

    def pieces(workspace: Workspace) -> dict[Any, int]:
        return {key: tensor.data_ptr() for key, tensor in workspace._held.items()}

    return {(place, key): where for place, workspace in optimizer._stacks.scratch.items() for key, where in pieces(workspace).items()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("plan", [{}, {"error": "none"}, {"rank": 16, "scaling": "column"}])
def test_no_loop_is_loaded_in_a_step(plan: dict[str, Any], fused: bool) -> None:
    arguments = [sys.executable, "-c", FOUND, json.dumps([SHAPES, fused, plan])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=300)
    before, after = map(int, done.stdout.split())
    assert before == after > 0


@pytest.mark.parametrize("error", ["codec", "none"])
def test_scratch_memory_is_there_before_the_first_step_and_after_a_state_is_loaded(error: str) -> None:
    params = matrices()
    optimizer = Mango(params, lr=1e-3, plan=LayerPlan(error=error))
    before = held(optimizer)
    for step in range(2):
        push(optimizer, params, step)
    assert before and held(optimizer) == before
    optimizer.load_state_dict(optimizer.state_dict())
    push(optimizer, params, 2)
    assert held(optimizer) == before


def test_nothing_of_a_rehearsal_is_kept() -> None:
    params, generator = matrices(), torch.get_rng_state()
    before = [param.detach().clone() for param in params]
    optimizer = Mango(params, lr=1e-3, weight_decay=0.1)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not optimizer.state and optimizer.nbytes() == 0 and not optimizer.state_dict()["state"]
    assert all(torch.equal(param, start) and param.grad is None for param, start in zip(params, before, strict=True))


def test_only_what_can_be_stepped_now_is_rehearsed() -> None:
    with torch.device("meta"):
        Mango(nn.Linear(256, 256).parameters())
    frozen = nn.Parameter(torch.zeros(256, 256), requires_grad=False)
    assert not held(Mango([frozen]))
    assert not held(Mango([nn.Parameter(torch.zeros(256, 256))], plan=None))


class Wrapped(Tensor):
    """A parameter of a class of its own, as sharded ones are."""


def test_a_parameter_of_another_class_is_left_alone() -> None:
    wrapped = nn.Parameter(torch.zeros(256, 256).as_subclass(Wrapped))
    assert not held(Mango([wrapped]))

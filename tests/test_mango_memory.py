"""Mango in little memory: gradients that are gone before the next one comes, state that never exceeds its budget."""

from __future__ import annotations

import gc
import io

import pytest
import torch
from torch import Tensor, nn

from mango import LayerPlan, Mango
from mango.errors import ConfigError
from mango.policy.budget import parse_budget
from mango.subspace import gaussian


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 5))


def batch(step: int) -> tuple[Tensor, Tensor]:
    return gaussian((16, 40), (7, step)), gaussian((16, 5), (8, step))


def train(model: nn.Module, optimizer: Mango, steps: range, parts: int = 1) -> None:
    for step in steps:
        for part in range(parts):
            x, y = batch(step * parts + part)
            loss = (model(x) - y).square().mean() / parts
            if part < parts - 1:
                with optimizer.accumulate():
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("parts", [1, 3])
def test_fused_backward_takes_the_same_steps(parts: int) -> None:
    results = []
    for fused in (False, True):
        model = network()
        optimizer = Mango(model.named_parameters(), lr=1e-2, plan=LayerPlan(rank=8), weight_decay=0.1, fuse_backward=fused)
        train(model, optimizer, range(5), parts)
        results.append([param.detach().clone() for param in model.parameters()])
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_fused_backward_holds_one_gradient_at_a_time() -> None:
    model = network()
    optimizer = Mango(model.parameters(), fuse_backward=True)
    held: list[int] = []
    for param in model.parameters():  # called after Mango's own hook
        param.register_post_accumulate_grad_hook(lambda _: held.append(sum(p.grad is not None for p in model.parameters())))
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    assert held == [0] * 6
    assert all(optimizer.state[param]["step"] == 1 for param in model.parameters())
    with optimizer.accumulate():
        (model(x) - y).square().mean().backward()
    assert all(param.grad is not None and optimizer.state[param]["step"] == 1 for param in model.parameters())


def test_fused_backward_clips_by_the_norm_of_the_rounds_before_and_resumes_with_it() -> None:
    model = network()
    optimizer = Mango(model.named_parameters(), lr=1e-2, fuse_backward=True, max_norm=1e-3)
    train(model, optimizer, range(2))
    running = optimizer.param_groups[0]["running_norm"]
    reference = network()  # unclipped gradients of the first round
    x, y = batch(0)
    (reference(x) - y).square().mean().backward()
    first = torch.stack([param.grad.norm() for param in reference.parameters() if param.grad is not None]).norm()
    assert 0.5 * float(first) < running < 2 * float(first)
    copy = network()
    copy.load_state_dict(model.state_dict())
    other = Mango(copy.named_parameters(), lr=1e-2, fuse_backward=True, max_norm=1e-3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    train(model, optimizer, range(2, 5))
    train(copy, other, range(2, 5))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), copy.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"max_norm = 1\.0 is not legal"):
        Mango(network().parameters(), max_norm=1.0)


def test_an_optimizer_that_is_gone_does_not_step() -> None:
    model = network()
    Mango(model.parameters(), fuse_backward=True)
    gc.collect()
    before = [param.detach().clone() for param in model.parameters()]
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("budget", ["0.9 bytes/param", "0.5 bytes/param", "20KiB"])
def test_a_memory_budget_is_never_exceeded(budget: str) -> None:
    model = network()
    optimizer = Mango(model.named_parameters(), lr=1e-2, memory_budget=budget)
    train(model, optimizer, range(2))
    limit = parse_budget(budget, sum(param.numel() for param in model.parameters()))
    assert 0 < optimizer.nbytes() <= limit
    again = Mango([{"params": network().parameters(), "lr": 0.5}], memory_budget=budget)  # unnamed, and as groups
    assert {group["lr"] for group in again.param_groups} == {0.5}
    plans = [sorted(str(group["plan"]) for group in each.param_groups) for each in (optimizer, again)]
    assert plans[0] == plans[1]


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ConfigError, match=r"memory_budget = '1 B' is not legal: at least \d+ bytes"):
        Mango(network().parameters(), memory_budget="1 B")
    kept = Mango([{"params": network().parameters(), "plan": None}], memory_budget="8 bytes/param")
    assert [group["plan"] for group in kept.param_groups] == [None]

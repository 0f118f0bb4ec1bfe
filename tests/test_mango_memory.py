"""Mango in little memory: gradients that are gone before the next one comes, state that never exceeds its budget."""

from __future__ import annotations

import gc
import io
import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from mango import LayerPlan, Mango
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.optim import stacks
from mango.optim.accounting import layer_nbytes
from mango.policy.budget import LADDER, parse_budget
from mango.telemetry import MemoryLedger


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


def test_scratch_memory_is_held_between_steps_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for holds, left in (("cpu",), 1), ((), 0):
        monkeypatch.setattr(stacks, "HOLDS", holds)
        model = network()
        optimizer = Mango(model.named_parameters(), lr=1e-2, plan=LayerPlan(rank=8))
        train(model, optimizer, range(3))
        assert len(optimizer._stacks.scratch) == left
        results.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


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
    assert [*optimizer.plans().values()] == [*again.plans().values()] and len(optimizer.param_groups) == 1


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ConfigError, match=r"memory_budget = '1 B' is not legal: at least \d+ bytes"):
        Mango(network().parameters(), memory_budget="1 B")
    kept = Mango([{"params": network().parameters(), "plan": None}], memory_budget="8 bytes/param")
    assert set(kept.plans().values()) == {None}


def drawn(number: int) -> tuple[nn.Module, int]:
    """A model and the width of its input, drawn by number: dense layers, with and without a bias, large and small."""
    draw = torch.Generator().manual_seed(number)
    count = int(torch.randint(2, 6, (), generator=draw))
    widths = [(24, 50, 81, 128)[place] for place in torch.randint(4, (count,), generator=draw).tolist()]
    torch.manual_seed(number)
    layers: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(pairwise(widths)):
        layers += [nn.Linear(inputs, outputs, bias=place % 2 == 0), nn.Tanh()]
    return nn.Sequential(*layers), widths[0]


def used(ledger: MemoryLedger, optimizer: Mango) -> int:
    return ledger.parameters() + ledger.gradients() + ledger.saved_activations + optimizer.nbytes()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("number", range(25))
def test_a_budget_of_everything_is_never_exceeded_however_activations_grow(number: int, fused: bool) -> None:
    model, width = drawn(number)
    values = sum(param.numel() for param in model.parameters())
    draw = torch.Generator().manual_seed(100 + number)
    budget = int(
        values * (9.5 + 7.0 * float(torch.rand((), generator=draw)))
    )  # weights and gradients take 8 bytes a value (fused: 5 or so)
    ledger = MemoryLedger(model)
    try:
        optimizer = Mango(model.named_parameters(), lr=1e-3, memory_budget=budget, ledger=ledger, fuse_backward=fused)
    except ConfigError as error:
        assert least(error) > budget
        return
    rows, plans = 1, [optimizer.plans()]
    while rows < 1 << 20:
        with ledger.activations():
            loss = model(torch.ones(rows, width)).square().mean()
        try:
            loss.backward()
            optimizer.step()
        except ConfigError as error:  # what is asked for cannot be had, and the message says what could be
            gradients = [param.nbytes for param in model.parameters()]
            smallest = sum(min(layer_nbytes(param.shape, rung) for rung in LADDER) for param in model.parameters())
            held = ledger.parameters() + (max if fused else sum)(gradients) + ledger.saved_activations
            assert least(error) == held + smallest > budget
            break
        assert optimizer.nbytes() > 0 and used(ledger, optimizer) <= budget
        optimizer.zero_grad()
        plans.append(optimizer.plans())
        rows *= 2
    assert rows < 1 << 20
    state = [sum(layer_nbytes(param.shape, plan.get(name)) for name, param in model.named_parameters()) for plan in plans]
    assert state == sorted(state, reverse=True)


def least(error: ConfigError) -> int:
    found = re.search(r"at least (\d+) bytes", str(error))
    assert found is not None
    return int(found[1])


def test_layers_that_are_unfrozen_or_added_make_the_others_smaller() -> None:
    model = network()
    model[2].requires_grad_(False)
    optimizer = Mango(model.named_parameters(), lr=1e-2, memory_budget="24 KiB")
    train(model, optimizer, range(2))
    before = optimizer.plans()["0.weight"]
    model[2].requires_grad_(True)
    train(model, optimizer, range(2, 4))
    assert 0 < optimizer.nbytes() <= 24 << 10
    between = optimizer.plans()["0.weight"]
    assert before != between
    more = nn.Linear(64, 96)
    optimizer.add_param_group({"params": more.named_parameters()})
    more(torch.ones(2, 64)).square().mean().backward()
    train(model, optimizer, range(4, 6))
    assert 20 << 10 < optimizer.nbytes() <= 24 << 10
    with pytest.raises(ConfigError, match="at least"):
        optimizer.add_param_group({"params": nn.Linear(512, 512).named_parameters()})
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, range(6, 7))


def test_another_budget_converts_and_the_same_one_resumes_bit_for_bit() -> None:
    model = network()
    optimizer = Mango(model.named_parameters(), lr=1e-2, memory_budget="1 bytes/param")
    train(model, optimizer, range(2))
    optimizer.replan("0.7 bytes/param")
    train(model, optimizer, range(2, 4))
    values = sum(param.numel() for param in model.parameters())
    assert 0 < optimizer.nbytes() <= 0.7 * values
    saved = optimizer.state_dict()
    for budget, equal in (("0.7 bytes/param", True), ("0.5 bytes/param", False)):
        twin = network()
        twin.load_state_dict(model.state_dict())
        other = Mango(twin.named_parameters(), memory_budget=budget)
        other.load_state_dict(saved)
        train(twin, other, range(4, 6))
        assert 0 < other.nbytes() <= float(budget.split()[0]) * values
        copy = network()
        copy.load_state_dict(model.state_dict())
        straight = Mango(copy.named_parameters(), memory_budget="0.7 bytes/param")
        straight.load_state_dict(saved)
        train(copy, straight, range(4, 6))
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), copy.parameters(), strict=True)) == equal


def test_budgets_that_make_no_sense() -> None:
    model = network()
    with pytest.raises(ConfigError, match="ledger = 'MemoryLedger' is not legal: given together with memory_budget"):
        Mango(model.parameters(), ledger=MemoryLedger(model))
    with pytest.raises(ConfigError, match="memory_budget = None is not legal: a number of bytes"):
        Mango(model.parameters()).replan()
    with pytest.raises(ConfigError, match="memory_budget of a group = 5 is not legal: left out"):
        Mango([{"params": model.parameters(), "memory_budget": 5}])
    optimizer = Mango(model.named_parameters(), memory_budget="0.7 bytes/param")
    before = optimizer.plans()
    with pytest.raises(ConfigError, match=r"plan of 2.weight = .* is not legal: one with which the state stays within"):
        optimizer.set_plan("2.weight", LayerPlan(rank=1 / 2, error="gradient"))
    with pytest.raises(ConfigError, match="memory_budget = '1 B' is not legal: at least"):
        optimizer.replan("1 B")
    train(model, optimizer, range(1))
    assert optimizer.plans() == before
    with pytest.raises(ConfigError, match=r"of which \d+ for weights, gradients and saved activations"):
        Mango(model.named_parameters(), memory_budget="8 bytes/param", ledger=MemoryLedger(model))

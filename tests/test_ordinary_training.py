"""What ordinary training scripts do to an optimizer: mixed precision, scaled losses, accumulation, freezing, tied weights, schedules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mango import LayerPlan, Mango
from mango.draws import gaussian

PLAN = LayerPlan(rank=8)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 5))


def batch(step: int, rows: int = 32) -> tuple[Tensor, Tensor]:
    x = gaussian((rows, 48), (7, step))
    return x, x[:, :5].sin()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return (model(x) - y).square().mean()


def parameters(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(one: nn.Module, two: nn.Module, **tolerance: float) -> bool:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.allclose(a, b, **tolerance) if tolerance else torch.equal(a, b) for a, b in pairs)


def test_grad_scaler_changes_nothing_and_skips_what_overflows() -> None:
    plain, scaled = network(), network()
    one, two = (Mango(model.named_parameters(), lr=1e-2, plan=PLAN) for model in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(6):
        for model, optimizer in ((plain, one), (scaled, two)):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            (loss if optimizer is one else scaler.scale(loss)).backward()
            if optimizer is one:
                optimizer.step()
            else:
                scaler.unscale_(optimizer)  # as for clipping; a power of two is exact
                scaler.step(optimizer)
                scaler.update()
    assert scaler.get_scale() == 2.0**13 and same(plain, scaled)
    before, state = parameters(scaled), two.state[scaled[0].weight]["step"]
    two.zero_grad()
    scaler.scale(loss_of(scaled, 6)).backward()
    assert scaled[0].weight.grad is not None
    scaled[0].weight.grad[3, 4] = float("inf")
    scaler.step(two)
    scaler.update()
    assert scaler.get_scale() == 2.0**12 and two.state[scaled[0].weight]["step"] == state
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(scaled), strict=True))


def test_bf16_autocast_trains_as_well_as_single_precision() -> None:
    """In the mean over runs, because rounding sends each of them another way: single losses differ by a tenth, up or down."""
    losses = {False: 0.0, True: 0.0}
    for enabled in losses:
        for run in range(16):
            model = network(run)
            optimizer = Mango(model.named_parameters(), lr=1e-2, plan=PLAN)
            for step in range(40):
                optimizer.zero_grad()
                x, y = batch(1000 * run + step, 16)
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    out = model(x)
                (out.float() - y).square().mean().backward()
                optimizer.step()
            assert all(param.dtype == torch.float32 for param in model.parameters())
            losses[enabled] += sum(float(loss_of(model, 10_000 + number).detach()) for number in range(8)) / 128
    before = sum(float(loss_of(network(run), 10_000).detach()) for run in range(16)) / 16
    assert losses[True] < 1.05 * losses[False] and losses[False] < 0.3 * before


def test_half_precision_models_train() -> None:
    model = network().bfloat16()
    optimizer = Mango(model.named_parameters(), lr=1e-2, plan=PLAN)

    def error() -> float:
        x, y = batch(99)
        return float((model(x.bfloat16()).detach().float() - y).square().mean())

    before = error()
    for step in range(40):
        optimizer.zero_grad()
        x, y = batch(step)
        (model(x.bfloat16()).float() - y).square().mean().backward()
        optimizer.step()
    assert error() < 0.5 * before


def test_accumulated_gradients_step_as_their_sum() -> None:
    whole, parts = network(), network()
    one, two = (Mango(model.named_parameters(), lr=1e-2, plan=PLAN) for model in (whole, parts))
    for step in range(0, 8, 2):
        one.zero_grad()
        ((loss_of(whole, step) + loss_of(whole, step + 1)) / 2).backward()
        one.step()
        two.zero_grad()
        for part in (step, step + 1):
            (loss_of(parts, part) / 2).backward()
        two.step()
    assert same(whole, parts, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_layers_are_frozen_and_unfrozen(fused: bool) -> None:
    model = network()
    model[2].requires_grad_(False)
    optimizer = Mango(model.named_parameters(), lr=1e-2, plan=PLAN, fuse_backward=fused)

    def run(steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    head, body = model[2].weight, model[0].weight
    start = head.detach().clone()
    run(range(2))
    assert torch.equal(head, start) and not optimizer.state[head]
    model[2].requires_grad_(True)
    run(range(2, 4))
    assert not torch.equal(head, start) and optimizer.state[head]["step"] == 2
    model[0].requires_grad_(False)
    kept, state = body.detach().clone(), {key: value.clone() for key, value in optimizer.state[body].items() if isinstance(value, Tensor)}
    run(range(4, 6))
    assert torch.equal(body, kept) and all(torch.equal(value, optimizer.state[body][key]) for key, value in state.items())
    model[0].requires_grad_(True)
    run(range(6, 8))
    assert not torch.equal(body, kept) and [optimizer.state[param]["step"] for param in (body, head)] == [6, 6]


@pytest.mark.parametrize("fused", [False, True])
def test_tied_weights_are_stepped_once_by_the_sum_of_their_gradients(fused: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(96, 48), nn.Linear(48, 96, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    torch.manual_seed(0)
    model = Tied()
    twin = nn.Parameter(model.head.weight.detach().clone())
    optimizer = Mango(model.named_parameters(), lr=1e-2, plan=PLAN, fuse_backward=fused)
    alone = Mango([("embedding.weight", twin)], lr=1e-2, plan=PLAN)
    for step in range(3):
        tokens = torch.randint(96, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
        optimizer.step()
        alone.zero_grad()
        nn.functional.cross_entropy(nn.functional.embedding(tokens, twin) @ twin.T, tokens.roll(1)).backward()
        alone.step()
    assert len(optimizer.state) == 1 and model.head.weight is model.embedding.weight
    assert torch.allclose(model.head.weight, twin, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "onecycle", "groups", "plateau"])
def test_schedulers_reach_the_step(kind: str) -> None:
    model = network()
    if kind == "groups":
        groups = [{"params": model[0].named_parameters(), "lr": 1e-2}, {"params": model[2].named_parameters(prefix="head"), "lr": 1e-3}]
        optimizer = Mango(groups, plan=PLAN)
    else:
        optimizer = Mango(model.named_parameters(), lr=1e-2, plan=PLAN)
    scheduler = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10, cycle_momentum=True),
        "groups": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda step: float(step < 2)]),
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.0, patience=0),
    }[kind]()
    moved = []
    for step in range(5):
        before = parameters(model)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step(*([1.0] if kind == "plateau" else []))
        moved.append([float((a - b).norm()) for a, b in zip(before, parameters(model), strict=True)])
    if kind == "cosine":  # the rate is zero after four steps
        assert moved[4] == [0.0] * 4 and moved[3][0] < 0.3 * moved[0][0]
    elif kind == "onecycle":  # which moves beta1 too
        assert moved[2][0] > 1.5 * moved[0][0] and optimizer.param_groups[0]["betas"][0] > 0.85
    elif kind == "groups":
        assert min(moved[4][:2]) > 0 and moved[4][2:] == [0.0, 0.0]
    else:
        assert moved[4] == [0.0] * 4 and min(moved[0]) > 0


def test_a_copied_optimizer_and_model_go_on_alike() -> None:
    model = network()
    optimizer = Mango(model.named_parameters(), lr=1e-2, plan=PLAN)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    other, twin = copy.deepcopy((model, optimizer))
    for each, stepper in ((model, optimizer), (other, twin)):
        for step in range(2, 4):
            stepper.zero_grad()
            loss_of(each, step).backward()
            stepper.step()
    assert same(model, other)


def test_hooks_of_torch_are_called() -> None:
    model = network()
    optimizer = Mango(model.parameters(), plan=PLAN)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    loss_of(model, 0).backward()
    optimizer.step()
    assert calls == ["before", "after"]

"""A plain script that takes Mango for AdamW, on models that this project did not write: it reaches the loss and resumes to the bit."""

from __future__ import annotations

import io

import pytest
import torch
from foreign import CASES, train
from torch.nn import functional

from mango import Mango

FAST = ("dense", "audio", "experts", "gru", "llama")  # seconds each
GRID = (5e-3, 1e-2, 3e-2)  # the best rate of each optimizer lies inside


@pytest.mark.parametrize("name", FAST)
def test_mango_with_its_defaults_reaches_the_loss_of_adamw(name: str) -> None:
    steps = 60
    theirs = min(train(CASES[name], lambda params, lr=lr: torch.optim.AdamW(params, lr=lr), steps=steps) for lr in GRID)
    ours = min(train(CASES[name], lambda params, lr=lr: Mango(params, lr=lr), steps=steps) for lr in GRID)
    assert ours <= 1.02 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_mango_reaches_the_loss_of_adamw_on_every_kind_of_model(name: str) -> None:
    """The whole run, a wider grid for both, the mean of two seeds."""
    best = {}
    for kind, make in (("adamw", torch.optim.AdamW), ("mango", Mango)):
        losses = []
        for lr in (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2):
            losses.append(sum(train(CASES[name], lambda params, lr=lr, make=make: make(params, lr=lr), seed) for seed in range(2)) / 2)
        best[kind] = min(losses)
    assert best["mango"] <= 1.02 * best["adamw"], best


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_resumes_to_the_bit(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, other = case.build(), case.build()
    one, two = Mango(model.parameters(), lr=1e-3), Mango(other.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    batches = [case.batch(draw) for _ in range(4)]

    def run(network: torch.nn.Module, optimizer: Mango, part: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for inputs, targets in part:
            optimizer.zero_grad()
            functional.cross_entropy(network(inputs).flatten(0, -2), targets.flatten()).backward()
            optimizer.step()

    run(model, one, batches[:2])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": one.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    two.load_state_dict(saved["optimizer"])
    run(model, one, batches[2:])
    run(other, two, batches[2:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert one.nbytes() == two.nbytes() > 0

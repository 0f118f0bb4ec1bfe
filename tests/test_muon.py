"""Muon against torch's own, and its split of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_optim import make, parameters
from torch import nn

from mango.draws import gaussian
from mango.optim import muon
from mango.optim.muon import Muon, polar


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "momentum": 0.8}, {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}])
def test_muon_equals_torch_up_to_bfloat16(options: dict[str, Any], units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon rounds to bfloat16 in every product; steps agree to that, and the momentum, which is not multiplied, exactly.

    Where ours rounds too, each of them is that far from the exact step.
    """
    monkeypatch.setattr(muon, "bfloat16_units", lambda device: units)
    shapes = [(24, 40), (40, 24), (24, 40), (16, 16)]
    ours = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    pair = (Muon(ours, lr=0.1, **options), torch.optim.Muon(theirs, lr=0.1, **options))
    for number in range(4):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = b.grad = gaussian(a.shape, (number, index))
        for optimizer in pair:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(pair[0].state[a]["momentum_buffer"], pair[1].state[b]["momentum_buffer"])
        assert (a - b).norm() < (0.04 if units else 0.02) * b.norm()


def test_muon_within_autocast_multiplies_in_the_type_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "bfloat16_units", lambda device: False)
    stepped = []
    for enabled in (False, True):
        param = torch.nn.Parameter(torch.zeros(24, 40))
        param.grad = gaussian((24, 40), (0,))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            Muon([param], lr=0.1).step()
        stepped.append(param.detach())
    assert torch.equal(*stepped)


def test_polar_moves_singular_values_to_one() -> None:
    x = gaussian((2, 30, 20), (1,)).double()
    values = torch.linalg.svdvals(polar(x))
    assert values.min() > 0.65 and values.max() < 1.25
    assert torch.allclose(polar(x.mT), polar(x).mT)


def test_muon_folds_convolutions_like_a_matrix() -> None:
    conv = [("w", nn.Parameter(gaussian((64, 16, 3, 3), (0,))))]
    flat = [("w", nn.Parameter(gaussian((64, 144), (0,)).reshape(64, 144)))]
    flat[0][1].data.copy_(conv[0][1].detach().flatten(1))
    goal = gaussian((64, 144), (1,))
    for named in (conv, flat):
        optimizer = make("muon", named)
        for _ in range(3):
            optimizer.zero_grad()
            (named[0][1].flatten(1) - goal).square().sum().backward()
            optimizer.step()
    assert torch.equal(conv[0][1].flatten(1), flat[0][1])


def test_muon_gives_parameters_of_the_rest_rates_of_their_own() -> None:
    named = parameters()
    optimizer = make("muon", named, rest_lr=0.5, rates={"bias": 0.25, "s": 0.125})
    rates = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}
    assert {name: rates[id(param)] for name, param in named if name in ("small", "bias", "scale", "a")} == {
        "a": 0.05,
        "bias": 0.25,  # the first pattern that is found
        "small": 0.125,
        "scale": 0.125,
    }

"""Plain AdamW, which steps what is not compressed, against torch's and in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mango import Mango
from mango.draws import gaussian
from mango.optim.adamw import adamw


@pytest.mark.parametrize("turned", [False, True])  # torch's fused kernel, and what takes its place where a matrix does not lie row by row
@pytest.mark.parametrize("maximize", [False, True])
def test_small_tensors_and_groups_without_a_plan_are_adamw(turned: bool, maximize: bool) -> None:
    start = gaussian((64, 96), (0,))
    ours = [
        nn.Parameter(start.mT.contiguous().mT if turned else start),
        nn.Parameter(gaussian((30, 20), (1,))),
        nn.Parameter(torch.ones(())),
    ]
    assert ours[0].is_contiguous() != turned
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    one = Mango(ours, lr=0.01, weight_decay=0.1, plan=None, maximize=maximize)
    two = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, maximize=maximize)
    for step in range(5):
        for i, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            if (i, step) == (1, 2):  # which is a step behind from then on
                left.grad = right.grad = None
                continue
            left.grad = right.grad = gaussian((*left.shape, 1), (i, step))[..., 0]
        one.step()
        two.step()
    assert all(torch.allclose(left, right, rtol=1e-5, atol=1e-7) for left, right in zip(ours, theirs, strict=True))


def test_adamw_first_step_in_closed_form() -> None:
    param, grad = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -3.0])
    first, second = torch.zeros(2), torch.zeros(2)
    adamw([param], [grad], [first], [second], [1], lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.5, maximize=False)
    assert torch.allclose(param, torch.tensor([1.0, -2.0]) * (1 - 0.05) - 0.1 * grad.sign())
    assert torch.allclose(first, 0.1 * grad) and torch.allclose(second, 0.01 * grad.square())

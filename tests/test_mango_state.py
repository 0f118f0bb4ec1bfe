"""What Mango keeps between steps, saves and loads, and what it refuses."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from test_mango import matrix, push
from torch import Tensor, nn

from mango import LayerPlan, Mango, codecs
from mango.draws import gaussian
from mango.errors import ConfigError, NonFinite
from mango.optim.guard import Guard
from mango.optim.plan import matrix_count, matrix_shape


@pytest.mark.parametrize("shape", [(64, 96), (65, 67), (96, 5, 3, 3), (3, 40, 40)])
@pytest.mark.parametrize("error", ["none", "gradient", "codec"])
def test_bytes_equal_the_codecs_own_count(shape: tuple[int, ...], error: str) -> None:
    param = nn.Parameter(gaussian((*shape, 1), (0,))[..., 0])
    plan = LayerPlan(error=error)
    optimizer = Mango([param], plan=plan)
    assert optimizer.nbytes() == 0
    push(optimizer, [(param, torch.ones_like(param))])
    experts, (rows, cols) = matrix_count(shape), matrix_shape(shape)
    small, large, rank = min(rows, cols), max(rows, cols), plan.columns(rows, cols)
    pad = lambda values, block: -(-values // block) * block  # noqa: E731
    moment, held = codecs.get(plan.moment_codec), codecs.get(plan.error_codec)
    expected = codecs.get(plan.basis_codec).nbytes((small * rank,)) + 2 * moment.nbytes((pad(rank * large, moment.block),))
    expected += {"none": 0, "gradient": 4 * rows * cols, "codec": held.nbytes((pad(rows * cols, held.block),))}[error]
    expected += 4 * (rows + cols)  # mean squares of the residual's rows and columns
    assert experts == (3 if len(shape) == 3 else 1)
    assert optimizer.nbytes() == experts * expected


def test_state_is_plain_and_resumes_across_changed_membership() -> None:
    params = [matrix(seed=seed) for seed in range(3)]
    optimizer = Mango([(f"w{i}", param) for i, param in enumerate(params)], lr=0.01)
    grad = gaussian((64, 96), (9,))
    push(optimizer, [(param, grad) for param in params])
    params[1].grad = None  # the stack is regrouped, and the absent layer keeps its state
    kept = {key: value.clone() for key, value in optimizer.state[params[1]].items() if isinstance(value, Tensor)}
    for param in (params[0], params[2]):
        param.grad = grad.clone()
    optimizer.step()
    assert all(torch.equal(value, optimizer.state[params[1]][key]) for key, value in kept.items())
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [param.detach() for param in params]), file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    assert all(isinstance(v, int | Tensor) for entry in state["state"].values() for v in entry.values())
    others = [nn.Parameter(value) for value in values]
    restored = Mango([(f"w{i}", param) for i, param in enumerate(others)], lr=0.5)
    restored.load_state_dict(state)
    for _ in range(3):
        push(optimizer, [(param, grad) for param in params])
        push(restored, [(param, grad) for param in others])
    assert all(torch.equal(one, two) for one, two in zip(params, others, strict=True))
    assert optimizer.nbytes() == restored.nbytes()


def test_loading_leaves_the_given_state_alone() -> None:
    param = matrix()
    optimizer = Mango([param])
    push(optimizer, [(param, torch.ones(64, 96))])
    state = optimizer.state_dict()
    saved = {key: value.clone() for key, value in state["state"][0].items() if isinstance(value, Tensor)}
    other = matrix()
    restored = Mango([other])
    restored.load_state_dict(state)
    push(restored, [(other, gaussian((64, 96), (1,)))])
    assert all(torch.equal(value, state["state"][0][key]) for key, value in saved.items())


@pytest.mark.parametrize(
    "plan, message",
    [
        (LayerPlan(rank=4), r"state of w, \S+ = '\(.*' is not legal: \(.* under its plan"),
        (LayerPlan(rank=8, moment_codec="bf16"), r"state of w, exp_avg"),
        (LayerPlan(rank=8, error="none"), r"state of w, error\.\w+ = .* is not legal: absent under its plan"),
        (None, r"state of w, exp_avg = .* is not legal: a tensor of shape \(64, 96\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(plan: LayerPlan | None, message: str) -> None:
    param = matrix()
    optimizer = Mango([("w", param)], plan=LayerPlan(rank=8))
    push(optimizer, [(param, torch.ones(64, 96))])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["plan"] = plan.plain() if plan else None
    with pytest.raises(ConfigError, match=message):
        Mango([("w", matrix())]).load_state_dict(state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_are_refused_before_anything_changes(bad: float) -> None:
    fine, broken, small = matrix(), matrix(seed=1), nn.Parameter(torch.zeros(7))
    optimizer = Mango([("fine", fine), ("layers.3.weight", broken), ("bias", small)])
    grad = gaussian((64, 96), (0,))
    push(optimizer, [(fine, grad), (broken, grad), (small, torch.ones(7))])
    before = [param.detach().clone() for param in (fine, broken, small)]
    state = {key: value.clone() for key, value in optimizer.state[fine].items() if isinstance(value, Tensor)}
    spoilt = grad.clone()
    spoilt[3, 5] = bad
    with pytest.raises(NonFinite, match=r"the gradient of layers.3.weight, bias holds NaN or infinity"):
        push(optimizer, [(fine, grad), (broken, spoilt), (small, torch.full((7,), bad))])
    assert all(torch.equal(one, two) for one, two in zip(before, (fine, broken, small), strict=True))
    assert all(torch.equal(value, optimizer.state[fine][key]) for key, value in state.items())
    push(optimizer, [(fine, grad), (broken, grad), (small, torch.ones(7))])  # and training may go on


def test_finite_gradients_are_admitted_whatever_their_size() -> None:
    grads = [
        torch.tensor([3e38, -3e38]),
        torch.empty(0, 4),
        torch.tensor([6e4, -6e4], dtype=torch.float16),
        torch.ones(2, dtype=torch.bfloat16),
    ]
    assert all(one is other for one, other in zip(Guard().admit(grads, list("abcd")), grads, strict=True))


def test_sparse_complex_and_integer_are_refused_by_name() -> None:
    param = matrix()
    optimizer = Mango([("table", param)])
    param.grad = torch.ones(64, 96).to_sparse()
    with pytest.raises(ConfigError, match=r"table.grad = 'sparse' is not legal: a dense real gradient"):
        optimizer.step()
    with pytest.raises(ConfigError, match=r"w.dtype = torch.complex64 is not legal: a real floating point type"):
        Mango([("w", nn.Parameter(torch.zeros(64, 96, dtype=torch.complex64)))])
    with pytest.raises(ConfigError, match=r"param_groups\[0\]\['params'\]\[0\]\.dtype = torch.complex64"):
        Mango([nn.Parameter(torch.zeros(64, 96, dtype=torch.complex64))])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, r"lr = -1.0 is not legal: a finite number >= 0"),
        ({"lr": float("nan")}, r"lr = nan is not legal"),
        ({"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\) is not legal: two numbers in \[0, 1\)"),
        ({"eps": -1e-8}, r"eps = -1e-08 is not legal: a finite number >= 0"),
        ({"weight_decay": -0.1}, r"weight_decay = -0.1 is not legal"),
        ({"seed": -1}, r"seed = -1 is not legal: an integer >= 0"),
        ({"plan": {"rank": 65}}, r"plan.rank = 65 is not legal: at most 64, the smaller dimension of w folded to 64 x 96"),
        ({"plan": 3}, r"plan = 3 is not legal: a LayerPlan, a mapping of its fields, or None"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mango([("w", matrix())], **options)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, r"plan.rank = 0 is not legal: an integer >= 1 or a fraction in \(0, 1\]"),
        ({"rank": 1.5}, r"plan.rank = 1.5 is not legal"),
        ({"rank": True}, r"plan.rank = True is not legal"),
        ({"rank": "8"}, r"plan.rank = '8' is not legal"),
        ({"scouts": -1}, r"plan.scouts = -1 is not legal: an integer >= 0"),
        ({"moment_codec": "int7"}, r"plan.moment_codec = 'int7' is not legal: one of bf16, fp32"),
        ({"error": "grad"}, r"plan.error = 'grad' is not legal: one of none, gradient, codec"),
        ({"caution": 1.5}, r"plan.caution = 1.5 is not legal: a number in \[0, 1\]; 0 for none"),
        ({"caution": True}, r"plan.caution = True is not legal"),
        ({"error_decay": 0.0}, r"plan.error_decay = 0.0 is not legal: a number in \(0, 1\]; for no error, error = none"),
        ({"residual": 1}, r"plan.residual = 1 is not legal: true or false"),
    ],
)
def test_bad_plans(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LayerPlan(**fields)


def test_rank_rule() -> None:
    assert LayerPlan(rank=0.125).columns(96, 64) == 8
    assert LayerPlan(rank=0.125).columns(7, 1000) == 1
    assert LayerPlan(rank=1.0).columns(7, 1000) == 7
    assert LayerPlan(rank=1).columns(7, 1000) == 1


def test_a_group_that_is_refused_is_not_added() -> None:
    optimizer = Mango([("w", matrix())])
    with pytest.raises(ConfigError, match=r"plan.rank = 65"):
        optimizer.add_param_group({"params": [("v", matrix(seed=1))], "plan": {"rank": 65}})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("v", matrix(seed=1))], "plan": {"rank": 4}, "lr": 0.5})
    assert optimizer.param_groups[1]["plan"] == LayerPlan(rank=4).plain()

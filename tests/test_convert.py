"""Plans changed under way and at loading: what must be kept to the bit, what must be kept approximately, what is refused."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mango import LayerPlan, Mango
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes
from mango.optim.convert import convert

EXACT = LayerPlan(rank=8, basis_codec="fp32", moment_codec="fp32", error="gradient")
PLANS = {
    "default": LayerPlan(),
    "exact": EXACT,
    "rank 4": LayerPlan(rank=4),
    "rank 20": LayerPlan(rank=20, scouts=3),
    "no error": LayerPlan(rank=8, error="none"),
    "other codecs": LayerPlan(rank=8, basis_codec="int8", moment_codec="bf16", error_codec="int8", factor_codec="int8"),
    "drawing codecs": LayerPlan(rank=8, error_codec="int4"),
    "half": LayerPlan(rank=12, power="half", residual=False),
    "full rank": LayerPlan(rank=1.0),
    "plain": None,
}
SHAPES = ((64, 96), (96, 64), (3, 40, 48))


def matrix(shape: tuple[int, ...] = (64, 96), seed: int = 0) -> nn.Parameter:
    return nn.Parameter(gaussian(shape, (seed,)) * 0.1)


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Steady directions of falling strength, and noise."""
    rows, cols = shape[-2:]
    small = min(rows, cols)
    steady = torch.eye(small, rows).mT @ torch.diag(1.2 ** -torch.arange(float(small))) @ torch.eye(small, cols)
    return steady + 0.02 * gaussian(shape, (3, step))


def run(optimizer: Mango, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for param in params:
            param.grad = gradient(tuple(param.shape), step)
        optimizer.step()


def trained(plan: LayerPlan | None, steps: int = 6, **options: Any) -> tuple[nn.Parameter, Mango]:
    param = matrix(**options)
    optimizer = Mango([("w", param)], lr=0.01, plan=plan)
    run(optimizer, [param], range(steps))
    return param, optimizer


def tensors(optimizer: Mango, param: nn.Parameter) -> dict[str, Tensor]:
    return {key: value for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("new", PLANS)
@pytest.mark.parametrize("old", PLANS)
def test_every_plan_becomes_every_other_and_training_goes_on(old: str, new: str) -> None:
    shape = SHAPES[(list(PLANS).index(old) + list(PLANS).index(new)) % len(SHAPES)]
    param, optimizer = trained(PLANS[old], shape=shape)
    other = nn.Parameter(param.detach().clone())
    loaded = Mango([("w", other)], lr=0.5, plan=PLANS[new])
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.plans() == {"w": PLANS[new]} and loaded.param_groups[0]["lr"] == 0.01
    assert loaded.nbytes() == layer_nbytes(shape, PLANS[new])
    optimizer.set_plan("w", PLANS[new])
    assert all(torch.equal(value, tensors(loaded, other)[key]) for key, value in tensors(optimizer, param).items())
    lengths = step_lengths(optimizer, param, range(6, 12))
    assert optimizer.state[param]["step"] == 12
    assert max(lengths) < 1.15 * longest(new, shape)


def step_lengths(optimizer: Mango, param: nn.Parameter, steps: range) -> list[float]:
    kept = [param.detach().clone()]
    for step in steps:
        run(optimizer, [param], range(step, step + 1))
        kept.append(param.detach().clone())
    return [float((b - a).norm()) for a, b in pairwise(kept)]


@cache
def longest(plan: str, shape: tuple[int, ...]) -> float:
    """The longest step of an optimizer that had this plan all along."""
    param = matrix(shape)
    return max(step_lengths(Mango([("w", param)], lr=0.01, plan=PLANS[plan]), param, range(12)))


def test_equal_plans_copy_and_equal_parts_stay_to_the_bit() -> None:
    param, optimizer = trained(LayerPlan(rank=8))
    before = {key: value.clone() for key, value in tensors(optimizer, param).items()}
    stack = optimizer._stacks.of[param]
    optimizer.set_plan(param, {"rank": 8})
    assert optimizer._stacks.of[param] is stack  # nothing happened
    optimizer.set_plan("w", LayerPlan(rank=8, scouts=3))
    assert all(torch.equal(value, before[key]) for key, value in tensors(optimizer, param).items())
    optimizer.set_plan("w", LayerPlan(rank=8, error="none"))
    after = tensors(optimizer, param)
    assert before.keys() - after.keys() == {"error.codes", "error.scales"}
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    optimizer.set_plan("w", LayerPlan(rank=8, moment_codec="fp32"))
    assert torch.equal(tensors(optimizer, param)["basis.values"], before["basis.values"])
    assert float(tensors(optimizer, param)["error.codes"].float().std()) == 0.0  # the error starts again from zero


def test_a_smaller_rank_keeps_the_strongest_and_a_larger_one_the_whole() -> None:
    param, optimizer = trained(EXACT)
    state = {key: value.clone() for key, value in tensors(optimizer, param).items()}
    basis, first, root = (state[f"{key}.values"].view(-1, width) for key, width in (("basis", 8), ("exp_avg", 96), ("exp_avg_sq_root", 96)))
    optimizer.set_plan("w", replace(EXACT, rank=3))
    small = tensors(optimizer, param)
    assert torch.allclose(small["basis.values"].view(64, 3), basis[:, :3], atol=1e-5)
    assert torch.allclose(small["exp_avg.values"].view(3, 96), first[:3], atol=1e-6)
    assert torch.allclose(small["exp_avg_sq_root.values"].view(3, 96), root[:3], atol=1e-5)
    assert torch.equal(small["error.values"], state["error.values"])
    optimizer.set_plan("w", replace(EXACT, rank=10))
    large = tensors(optimizer, param)
    grown = large["basis.values"].view(64, 10)
    assert torch.allclose(grown.mT @ grown, torch.eye(10), atol=1e-5)
    assert torch.allclose(grown[:, :3], basis[:, :3], atol=1e-5)
    first_now, root_now = (large[f"{key}.values"].view(10, 96) for key in ("exp_avg", "exp_avg_sq_root"))
    assert torch.allclose(first_now[:3], first[:3], atol=1e-6) and float(first_now[3:].abs().max()) < 1e-6
    assert torch.allclose(root_now[3:], root[2].expand(7, 96), atol=1e-5)  # the weakest direction's


def test_to_plain_adamw_and_back() -> None:
    param, optimizer = trained(EXACT)
    state = {key: value.clone() for key, value in tensors(optimizer, param).items()}
    basis, first, root = (state[f"{key}.values"].view(-1, width) for key, width in (("basis", 8), ("exp_avg", 96), ("exp_avg_sq_root", 96)))
    optimizer.set_plan("w", None)
    plain = tensors(optimizer, param)
    assert torch.allclose(plain["exp_avg"], basis @ first, atol=1e-6)
    outside = (1 - basis.square().sum(1, keepdim=True)).clamp_min(0)
    assert torch.allclose(plain["exp_avg_sq"], basis.square() @ root.square() + outside * root[-1].square(), atol=1e-6)
    optimizer.set_plan("w", EXACT)
    back = tensors(optimizer, param)
    again = back["basis.values"].view(64, 8)
    assert torch.allclose(again @ back["exp_avg.values"].view(8, 96), basis @ first, atol=1e-5)  # of rank 8: found whole
    assert float(back["error.values"].abs().max()) == 0.0


def test_a_tall_matrix_is_the_transpose_of_a_wide_one() -> None:
    states = {}
    for shape in ((64, 96), (96, 64)):
        gradients = [gradient((64, 96), step) for step in range(3)]
        param = nn.Parameter(torch.zeros(shape))
        optimizer = Mango([("w", param)], plan=EXACT)
        for grad in gradients:
            param.grad = grad if shape == (64, 96) else grad.mT.contiguous()
            optimizer.step()
        optimizer.set_plan("w", None)
        states[shape] = tensors(optimizer, param)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(states[64, 96][key], states[96, 64][key].mT, atol=1e-5)


def test_the_kept_error_survives_a_change_of_its_codec() -> None:
    param, optimizer = trained(EXACT)
    before = tensors(optimizer, param)["error.values"].clone()
    optimizer.set_plan("w", replace(EXACT, error="codec", error_codec="int8"))
    optimizer.set_plan("w", EXACT)
    after = tensors(optimizer, param)["error.values"]
    assert 0 < float((after - before).norm() / before.norm()) < 0.02


def test_a_change_under_way_touches_one_layer_and_resumes_to_the_bit() -> None:
    def setup(values: list[Tensor]) -> tuple[list[nn.Parameter], Mango]:
        params = [nn.Parameter(value.clone()) for value in values]
        return params, Mango(
            [(f"layers.{number}", param) for number, param in enumerate(params)], lr=0.01, plan=LayerPlan(rank=8, scouts=0)
        )

    start = [matrix(seed=seed).detach() for seed in range(3)]
    (untouched, one), (params, two) = setup(start), setup(start)
    run(one, untouched, range(4))
    run(two, params, range(4))
    changed = LayerPlan(rank=12, error="none")
    two.set_plan("layers.1", changed)
    run(one, untouched, range(4, 6))
    run(two, params, range(4, 6))
    assert two.plans() == {"layers.0": LayerPlan(rank=8, scouts=0), "layers.1": changed, "layers.2": LayerPlan(rank=8, scouts=0)}
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(untouched, params, strict=True)]
    assert same == [True, False, True]
    file = io.BytesIO()
    torch.save(two.state_dict(), file)
    file.seek(0)
    others, restored = setup([param.detach() for param in params])
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.plans() == two.plans() and restored.nbytes() == two.nbytes()
    for optimizer, group in ((two, params), (restored, others)):
        run(optimizer, group, range(6, 8))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    two.set_plan("layers.1", LayerPlan(rank=8, scouts=0))  # as the group has it: nothing is left to remember
    assert two.param_groups[0]["plans"] == {}


def test_before_the_first_step_nothing_has_to_be_converted() -> None:
    param = matrix()
    optimizer = Mango([("w", param)])
    optimizer.set_plan(param, LayerPlan(rank=3))
    assert optimizer.nbytes() == 0 and optimizer.state_dict()["state"] == {}
    run(optimizer, [param], range(2))
    assert optimizer.nbytes() == layer_nbytes((64, 96), LayerPlan(rank=3))


def test_across_devices() -> None:
    _, optimizer = trained(LayerPlan(rank=8))
    for plan in (LayerPlan(rank=8), LayerPlan(rank=20, error="gradient"), None):
        ghost = nn.Parameter(torch.empty(64, 96, device="meta"))
        shadow = Mango([("w", ghost)], plan=plan)
        shadow.load_state_dict(optimizer.state_dict())
        assert {value.device.type for value in tensors(shadow, ghost).values()} == {"meta"}
        assert shadow.nbytes() == layer_nbytes((64, 96), plan)
        shadow.set_plan("w", LayerPlan(rank=2))
        assert shadow.nbytes() == layer_nbytes((64, 96), LayerPlan(rank=2))
        with pytest.raises(ConfigError, match=r"state of w, \S+ = 'a tensor on the meta device' is not legal: one that holds data"):
            Mango([("w", matrix())], plan=plan).load_state_dict(shadow.state_dict())


@pytest.mark.parametrize(
    "which, plan, message",
    [
        ("v", LayerPlan(), r"which = 'v' is not legal: one of the matrices w"),
        ("bias", LayerPlan(), r"which = 'bias' is not legal: one of the matrices w"),
        (matrix(), LayerPlan(), r"which = 'a tensor of shape \(64, 96\)' is not legal: one of the matrices w"),
        ("w", {"rank": 65}, r"plan.rank = 65 is not legal: at most 64, the smaller dimension of w"),
        ("w", {"ranks": 4}, r"plan = 'ranks' is not legal: one of the fields rank"),
    ],
)
def test_changes_that_are_refused(which: Any, plan: Any, message: str) -> None:
    param, bias = matrix(), nn.Parameter(torch.zeros(8))
    optimizer = Mango([("w", param), ("bias", bias)], plan=LayerPlan(rank=8))
    run(optimizer, [param], range(2))
    before = {key: value.clone() for key, value in tensors(optimizer, param).items()}
    with pytest.raises(ConfigError, match=message):
        optimizer.set_plan(which, plan)
    assert optimizer.plans() == {"w": LayerPlan(rank=8)}
    assert all(torch.equal(value, before[key]) for key, value in tensors(optimizer, param).items())


def test_states_that_are_refused() -> None:
    param, optimizer = trained(LayerPlan(rank=8))
    with pytest.raises(ConfigError, match=r"state of w, \S+ = .* is not legal: .* under its plan"):
        Mango([("w", matrix((64, 128)))], plan=LayerPlan(rank=8)).load_state_dict(optimizer.state_dict())
    other = torch.optim.AdamW([param])
    param.grad = torch.ones_like(param)
    other.step()
    with pytest.raises(ConfigError, match=r"state_dict = 'parameter groups without a plan' is not legal: a state that Mango saved"):
        Mango([param]).load_state_dict(other.state_dict())
    with pytest.raises(ConfigError, match=r"state of w, step = None is not legal: an integer"):
        convert({}, (64, 96), LayerPlan(), None, torch.device("cpu"), (0,), "w")

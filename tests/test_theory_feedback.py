"""What T5-T7 rest on: the problems' constants, the rates as plain numbers, and the experiment of hostile workers."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor

from mango import compressors
from mango.errors import ConfigError
from mango.feedback import EF21, aggregators, attacks, rates
from theory import byzantine
from theory.problems import FiniteSum, Logistic, ThreeWorkers, breast_cancer, finite_sum


def differentiated(task: Logistic | ThreeWorkers, x: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    if isinstance(task, ThreeWorkers):
        value = (task.vectors @ point).square().mean() + point.square().sum() / 4
    else:
        margins = task.labels * (task.features @ point)
        value = torch.nn.functional.softplus(-margins).mean() + task.lam * (point**2 / (1 + point**2)).sum()
    assert value.item() == pytest.approx(task.value(x), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, point)
    return gradient


@pytest.mark.parametrize("task", [breast_cancer(), breast_cancer(homogeneous=True), ThreeWorkers()], ids=["dealt", "homogeneous", "three"])
def test_gradients_are_autograds(task: Logistic | ThreeWorkers) -> None:
    x = torch.randn(3 if isinstance(task, ThreeWorkers) else task.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(task.gradients(x).mean(0), differentiated(task, x), rtol=0, atol=1e-12)


def test_logistic_task_is_the_real_data() -> None:
    task = breast_cancer()
    assert task.features.shape == (8, 71, 30) and set(task.labels.unique().tolist()) == {-1.0, 1.0}
    assert pytest.approx(task.L, rel=1e-9) == breast_cancer(homogeneous=True).L
    assert task.L <= task.L_tilde <= max(task.L_workers)
    assert 0 < task.infimum < task.value(torch.zeros(30, dtype=torch.float64))
    whole = torch.arange(71).expand(8, -1)
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)
    assert torch.allclose(task.sampled(x, whole), task.gradients(x), atol=1e-12)


def test_smoothness_constants_are_exact_at_the_origin_and_valid_elsewhere() -> None:
    task, zero = breast_cancer(), torch.zeros(30, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    hessian = torch.stack([(task.gradient(zero + step * e) - task.gradient(zero - step * e)) / (2 * step) for e in torch.eye(30).double()])
    assert float(torch.linalg.eigvalsh(hessian)[-1]) == pytest.approx(task.L, rel=1e-6)
    for scale in (0.01, 0.3, 3.0):
        x, y = (scale * torch.randn(2, 30, generator=generator, dtype=torch.float64)).unbind()
        change, distance = task.gradients(x) - task.gradients(y), (x - y).norm()
        assert all(float(row.norm() / distance) <= L * (1 + 1e-9) for row, L in zip(change, task.L_workers, strict=True))
        singles = torch.stack(
            [task.sampled(x, i * ones) - task.sampled(y, i * ones) for ones in [torch.ones(8, 1).long()] for i in range(71)]
        )
        variance = (singles - change).square().sum(-1).mean()  # over samples and workers
        assert variance <= task.sample_variance * distance**2


def test_finite_sum_is_integer_and_consistent() -> None:
    task = finite_sum(3, 2, 4, seed=5)
    assert isinstance(task, FiniteSum) and torch.equal(task.vectors, task.vectors.round())
    x = torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)
    point = x.clone().requires_grad_()
    value = (task.curvatures[0] / 2 * (task.vectors[0] @ point - task.offsets[0]) ** 2).mean()
    assert torch.allclose(task.gradients(x)[0], torch.autograd.grad(value, point)[0])


def test_rates_are_the_published_numbers() -> None:
    three = ThreeWorkers()
    assert rates.ef21(1 / 3).step(three.L, three.L_tilde) == pytest.approx(0.00586, abs=5e-6)
    assert rates.ef21(0.75).step(2.0, 2.0) == pytest.approx((1 - 0.5) / 2.0)
    assert rates.ef21(1.0).step(2.0, 5.0) == 0.5
    for alpha in (0.0, -1.0, 1.5):
        with pytest.raises(ConfigError, match="alpha"):
            rates.ef21(alpha)
    assert rates.marina(0.0, 0.3, 4, 1.0) == 0.0
    assert rates.marina(4.0, 0.2, 8, 3.0) == pytest.approx(0.8 / 8 * 36)
    assert rates.byzantine(0.0, 0.5, 6, 0.0, 1.0) == 0.0
    p, cd = 0.5, 0.2
    V = 2 * 9 + 3 * 5
    expected = 2 / p * (1 - p) * ((1 + p / 2) * V / 6 + (1 + 2 / p) * cd * (2 * V + 12 / 5 * 4))
    assert rates.byzantine(2.0, p, 6, cd, 3.0, 5.0, 4.0) == pytest.approx(expected)


def test_admission_thresholds() -> None:
    """kappa < 1 with s = 1 asks sqrt(2) rho < 1 - a; some s > 0 does if rho < 1 - a."""
    for rho, alpha_one, alpha_any in ((0.0541421, 0.2326, 0.1949), (0.3398, 0.8502, 0.7573)):
        for threshold, factor in ((alpha_one, sqrt(2)), (alpha_any, 1.0)):
            exact = 1 - ((1 - factor * rho) / (1 + rho)) ** 2
            assert exact == pytest.approx(threshold, abs=1e-3)
        exact = 1 - ((1 - sqrt(2) * rho) / (1 + rho)) ** 2
        assert rates.quantised_state(exact + 1e-6, rho).admissible and not rates.quantised_state(exact - 1e-6, rho).admissible


def test_schedule_by_hand() -> None:
    plan = rates.schedule([0.75, 1.0, 0.75])  # theta = 1/2, 1, 1/2; beta = 1/2, 0, 1/2
    assert plan.w0 == 1 + 0.5 * (1 + 0 * 1) == 1.5 and plan.S == 0.5 * 1.0
    constant = rates.schedule([0.5] * 2000)
    assert constant.step(1.0, 1.0) == pytest.approx(rates.ef21(0.5).step(1.0, 1.0), rel=1e-9)
    with pytest.raises(ConfigError, match="alphas"):
        rates.schedule([])


def test_recursion_of_time_varying_plans_is_attained_by_its_own_recursion() -> None:
    """G_{t+1} = (1 - theta_t) G_t + beta_t R_t sums to at most w_0 G_0 + S sum R, for random plans."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        alphas = (0.01 + 0.98 * torch.rand(12, generator=generator)).tolist()
        moved = torch.rand(12, generator=generator).tolist()
        error = first = float(torch.rand((), generator=generator))
        total = 0.0
        for alpha, R in zip(alphas, moved, strict=True):
            total += error
            rate = rates.ef21(alpha)
            error = (1 - rate.theta) * error + rate.beta * R
        plan = rates.schedule(alphas)
        assert total <= plan.w0 * first + plan.S * sum(moved) + 1e-12


def test_quantised_state_is_no_contraction_to_the_gradient() -> None:
    """Small moves round back, which is why T5 measures against |grad f| and not against |g - h| alone."""
    method = EF21(compressors.Identity(), state="bf16")
    start = torch.ones(4)
    method.step([start])
    near = start + 2.0**-10  # closer to 1 than half a step of bfloat16
    method.step([near])
    assert torch.equal(method.tracked(0)[0], start) and not torch.equal(near, start)


@pytest.mark.parametrize("attack", [attacks.LittleIsEnough(2, z=1.5), attacks.InnerProduct(2, epsilon=0.5), attacks.SignFlip(2, scale=1e6)])
def test_other_strengths_of_the_attacks(attack: attacks.Attack) -> None:
    free = byzantine.run(aggregators.Mean(), None, 3)
    for name in ("trimmed", "rfa"):
        attacked = byzantine.run(aggregators.get(name), attack, 3)
        assert not attacked.diverged and attacked.last <= byzantine.WITHIN * free.last


def test_nan_run_is_reported_as_diverged() -> None:
    run = byzantine.run(aggregators.Mean(), attacks.NaN(2), 0)
    assert run.diverged and run.outcome >= byzantine.CEILING
    robust = byzantine.run(aggregators.CoordinateMedian(), attacks.NaN(2), 0)
    assert robust.dropped == 2 * byzantine.STEPS

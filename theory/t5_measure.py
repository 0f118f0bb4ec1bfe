"""T5's measurements: EF21 against its bounds on the logistic task, with exact and rounded states, and on the three divergent workers."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from mango import compressors
from mango.compressors.base import Compressor
from mango.feedback import EF21, rates
from theory.base import Case, Check
from theory.problems import Logistic, ThreeWorkers, breast_cancer, descend

STEPS = 200  # iterations on the logistic task
THREE = 1000  # on the three workers
POINTS = 100  # of each curve that is drawn


def check(seed: int) -> Check:
    task = breast_cancer()
    cases, curves = [], {}
    for label, compressor, state in _settings():
        case, curve = _logistic(task, label, compressor, state, seed)
        cases.append(case)
        curves[label] = curve
    linear, memoryless, control = _three_workers(seed)
    data = {
        "task": f"logistic regression with a nonconvex regulariser, breast cancer, {task.workers} workers, {STEPS} steps",
        "curves": curves,
        "three_workers": {"EF21": linear.pop("curve"), "top-1 without feedback": memoryless.pop("curve")},
    }
    return Check((*cases, linear["case"], memoryless["case"]), control, data)


def _settings() -> list[tuple[str, Compressor, str]]:
    """(label, compressor, state) on gradients reshaped to (5, 6): seven compressors with an exact state, three rounded states."""
    return [
        ("top-k, k = 3", compressors.TopK(k=3), "fp32"),
        ("rand-k, k = 6, unscaled", compressors.RandK(k=6, scaled=False), "fp32"),
        ("truncated SVD, rank 1", compressors.LowRank(rank=1), "fp32"),
        ("low rank and NF4, rank 2", compressors.LRQ(rank=2, codec="nf4"), "fp32"),
        ("NF4", compressors.Codec("nf4", block=64), "fp32"),
        ("sign with scale", compressors.Sign(), "fp32"),
        ("natural", compressors.Natural(), "fp32"),
        ("top-k, k = 3, bf16 state", compressors.TopK(k=3), "bf16"),
        ("top-k, k = 15, int8 state", compressors.TopK(k=15), "int8"),
        ("top-k, k = 28, NF4 state", compressors.TopK(k=28), "nf4"),
    ]


def _logistic(task: Logistic, label: str, compressor: Compressor, state: str, seed: int) -> tuple[Case, dict[str, Any]]:
    """Mean squared gradient norm over the first T iterates beside the bound (1), or (3) with s = 1 for a rounded state."""
    method = EF21(compressor, state=state, seed=seed)
    shape, x = (5, 6), torch.zeros(task.dim, dtype=torch.float64)

    def estimate(rows: Tensor) -> Tensor:
        answer = method.step([row.reshape(shape) for row in rows])
        assert isinstance(answer, Tensor)
        return answer.reshape(-1)

    alpha, admission = compressor.alpha(shape, torch.float64), method.admission(shape, torch.float64)
    rate = rates.ef21(alpha)
    gamma = rate.step(task.L, task.L_tilde) if method.codec is None else admission.step(task.L, task.L_tilde)
    initial = _initial_error(task, compressor, state, seed, shape)
    squared, spread, _ = descend(task.gradients, estimate, x, gamma, STEPS)
    kappa, forget = (0.0, rate.theta) if method.codec is None else (admission.kappa, 1 - admission.a)
    excess, floor = task.value(x) - task.infimum, kappa * max(spread) / (1 - kappa)

    def bound(T: int) -> float:
        return (2 * excess / (gamma * T) + initial / (forget * T)) / (1 - kappa) + floor

    means = (torch.tensor(squared, dtype=torch.float64).cumsum(0) / torch.arange(1, STEPS + 1)).tolist()
    times = [round(1 + k * (STEPS - 1) / (POINTS - 1)) for k in range(POINTS)]
    curve = {
        "alpha": alpha,
        "gamma": gamma,
        "t": times,
        "gradient": [sqrt(squared[t - 1]) for t in times],
        "mean": [means[t - 1] for t in times],
        "bound": [bound(t) for t in times],
    }
    return Case(f"mean |grad f|^2, {label}", bound(STEPS), means[-1]), curve


def _initial_error(task: Logistic, compressor: Compressor, state: str, seed: int, shape: Sequence[int]) -> float:
    """G_0 after the first message of a method with the same draws."""
    method = EF21(compressor, state=state, seed=seed)
    rows = task.gradients(torch.zeros(task.dim, dtype=torch.float64))
    method.step([row.reshape(*shape) for row in rows])
    kept = torch.stack([method.tracked(worker)[0].reshape(-1) for worker in range(task.workers)])
    return float((kept - rows).square().sum(1).mean())


def _three_workers(seed: int) -> tuple[dict[str, Any], dict[str, Any], Case]:
    """EF21 against (2); top-1 without feedback against its exact trajectory, and, as the control, against (1)."""
    task, top = ThreeWorkers(), compressors.TopK(k=1)
    rate = rates.ef21(top.alpha((3,), torch.float64))
    gamma = min(rate.step(task.L, task.L_tilde, pl=True), rate.theta / (2 * task.mu))
    start = torch.ones(3, dtype=torch.float64)
    method = EF21(top, seed=seed)

    def feedback(rows: Tensor) -> Tensor:
        answer = method.step(list(rows))
        assert isinstance(answer, Tensor)
        return answer

    def potential(x: Tensor) -> float:  # Psi after a round at x
        feedback(task.gradients(x))
        kept = torch.stack([method.tracked(worker)[0] for worker in range(3)])
        return task.value(x) + gamma / rate.theta * float((kept - task.gradients(x)).square().sum(1).mean())

    def plain(rows: Tensor) -> Tensor:
        return torch.stack([top(row) for row in rows]).mean(0)

    first = potential(start)
    method = EF21(top, seed=seed)
    squared, _, last = descend(task.gradients, feedback, start, gamma, THREE)
    linear = Case("Psi_T on the three workers (PL)", (1 - gamma * task.mu) ** THREE * first, potential(last))

    step = rate.step(task.L, task.L_tilde)
    diverging, _, far = descend(task.gradients, plain, start, step, THREE)
    exact = (1 + 11 * step / 6) ** (THREE)
    memoryless = Case("top-1 without feedback, relative distance from its exact trajectory", 1e-10, float((far / exact - 1).abs().max()))
    G0 = float(torch.stack([top(row) - row for row in task.gradients(start)]).square().sum(1).mean())
    T = len(diverging)
    claimed = 2 * task.value(start) / (step * T) + G0 / (rate.theta * T)
    control = Case("top-1 without feedback, three workers: mean |grad f|^2", claimed, sum(diverging) / T)
    times = list(range(0, T, T // POINTS))
    return (
        {"case": linear, "curve": {"t": times, "gradient": [sqrt(squared[t]) for t in times]}},
        {"case": memoryless, "curve": {"t": times, "gradient": [sqrt(diverging[t]) for t in times]}},
        control,
    )

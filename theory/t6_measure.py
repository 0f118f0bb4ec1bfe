"""T6's measurements: mango's methods against the recursions (all draws enumerated), the rates, and the aggregators' constants."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import comb
from typing import Any

import torch
from torch import Tensor

from mango import compressors
from mango.feedback import ByzVRMarina, Marina, VRMarina, aggregators, attacks, rates
from mango.feedback.aggregators import Aggregator
from mango.feedback.attacks import Attack
from mango.packed import Packed
from theory import aggregation, byzantine
from theory.base import Case, Check
from theory.problems import Logistic, breast_cancer, finite_sum

SEEDS = 3  # runs of which the rates' expectations are means
STEPS = 120
POINTS = 100


def check(seed: int) -> Check:
    hostile, failures, curves = byzantine.measure(seed)
    rate_cases, rate_curves = _rates(seed)
    cases = (*_recursions(seed), *rate_cases, _robust_rate(seed), *aggregation.measure(seed), *hostile)
    controls = [_biased(seed), *failures]
    least = min(control.measured / control.bound for control in controls)
    data = {
        "byzantine": curves,
        "rates": rate_curves,
        "controls": [{"name": c.name, "bound": c.bound, "measured": c.measured} for c in controls],
    }
    names = "; ".join(control.name for control in controls)
    return Check(cases, Case(f"least measured / bound of: {names}", 1.0, least), data)


def _recursions(seed: int) -> list[Case]:
    """E|e+|^2 of the shipped methods, over all payloads of mango's RandK, all samples and the coin."""
    cases = []
    for name, k, samples in (("MARINA", 2, 1), ("VR-MARINA", 1, 2)):
        measured, formula = _mean_recursion(k, samples, seed)
        # an equality: bound and measurement may differ by float64 rounding only, in either direction
        cases.append(Case(f"{name}, E|e+|^2 over all draws (equality)", formula, measured, 1e-12, 1e-12))
    for aggregator, attack in product(("trimmed", "median", "rfa", "krum", "clipping"), ("signflip", "alie")):
        measured, bound = _robust_recursion(aggregators.get(aggregator), attacks.get(attack, attackers=1), seed)
        cases.append(Case(f"Byz-VR-MARINA, E|e+|^2 over all draws, {aggregator} under {attack}", bound, measured))
    return cases


def _payloads(x: Tensor, k: int) -> list[Packed]:
    """Every payload that RandK(k) makes of x, each equally likely."""
    seen: dict[bytes, Packed] = {}
    operator, draw = compressors.RandK(k=k), 0
    while len(seen) < comb(x.numel(), k):
        packed = operator.compress(x, generator=torch.Generator().manual_seed(draw))
        positions = packed.parts["positions"]
        assert isinstance(positions, Tensor)
        seen.setdefault(bytes(positions.sort().values.tolist()), packed)
        draw += 1
    return list(seen.values())


def _rounds(method: VRMarina, error: Tensor, fresh: Tensor, old: Tensor, sent: Iterator[list[Packed]], attack: Attack | None) -> float:
    """Mean of |e+|^2 over the payloads ``sent`` of a compressed round that starts with the estimate ``old`` + ``error``."""
    method.step([old])  # the first round is full; the next is compressed for this seed
    assert not method.full
    state = method.state_dict() | {"estimate": [old + error]}
    total, count = 0.0, 0
    for payloads in sent:
        method.load_state_dict(state)
        estimate = method.absorb(payloads, attack)
        assert isinstance(estimate, Tensor)
        total += float((estimate - fresh).square().sum())
        count += 1
    return total / count


def _seed_with_compressed_round(probability: float, k: int) -> int:
    return next(s for s in range(1000) if not _second_round_is_full(VRMarina(compressors.RandK(k=k), probability, seed=s)))


def _second_round_is_full(method: VRMarina) -> bool:
    method.round = 1
    return method.full


def _changes(workers: int, samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample gradients at a point and at the next, (n, m, d); the distance of the points, squared; and an estimate's error."""
    task = finite_sum(workers, samples, 3, seed)
    x, y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64)
    return task.samples(x), task.samples(y), (y - x).square().sum(), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def _mean_recursion(k: int, samples: int, seed: int) -> tuple[float, float]:
    """(measured, formula (1) with equality) for p = 1/4 and 2 workers; MARINA when there is one sample a worker."""
    n, d, p = 2, 3, 0.25
    before, after, _, error = _changes(n, samples, seed)
    old, fresh = before.mean((0, 1)), after.mean((0, 1))
    method = VRMarina(compressors.RandK(k=k), p, seed=_seed_with_compressed_round(p, k))
    draws = [[packed for j in range(samples) for packed in _payloads(after[i, j] - before[i, j], k)] for i in range(n)]
    measured = (1 - p) * _rounds(method, error, fresh, old, (list(joint) for joint in product(*draws)), None)
    omega = d / k - 1
    change = (after - before).mean(1)  # (n, d)
    variance = (after - before - change[:, None]).square().sum(-1).mean(1)  # (n,)
    bound = error.square().sum() + (omega * change.square().sum(1) + (1 + omega) * variance).sum() / n**2
    return measured, float((1 - p) * bound)


def _robust_recursion(aggregator: Aggregator, attack: Attack, seed: int) -> tuple[float, float]:
    """(measured, bound (2)) for p = 1/2, 4 workers with 2 samples, the last worker hostile; the true spreads stand for the constants."""
    n, good, d, k, p = 4, 3, 3, 1, 0.5
    before, after, distance, error = _changes(n, 2, seed)
    old, fresh = before[:good].mean((0, 1)), after[:good].mean((0, 1))
    method = ByzVRMarina(compressors.RandK(k=k), p, aggregator, seed=_seed_with_compressed_round(p, k))
    draws = [[packed for j in range(2) for packed in _payloads(after[i, j] - before[i, j], k)] for i in range(good)]
    own = _payloads(after[3, 0] - before[3, 0], k)[0]
    compressed = _rounds(method, error, fresh, old, ([*joint, own] for joint in product(*draws)), attack)
    full = aggregator(attack(after.mean(1)))
    measured = (1 - p) * compressed + p * float((full - fresh).square().sum())

    omega = d / k - 1
    change = (after - before).mean(1)[:good]
    variance = (after - before).sub((after - before).mean(1, keepdim=True))[:good].square().sum(-1).mean()
    V = (omega * change.square().sum(1).mean() + (1 + omega) * variance) / distance
    hessian = (change - change.mean(0)).square().sum(1).mean() / distance
    certificate = aggregator.certificate(n)
    assert certificate is not None
    c_delta = certificate[0] * certificate[1]
    zeta2 = (after.mean(1)[:good] - fresh).square().sum(1).mean()
    pairs = 2 * good / (good - 1)
    B = (1 + p / 2) * V / good + (1 + 2 / p) * c_delta * (2 * V + pairs * hessian)
    bound = (1 - p / 2) * error.square().sum() + (1 - p) * B * distance + p * c_delta * pairs * zeta2
    return measured, float(bound)


def _rates(seed: int) -> tuple[list[Case], dict[str, Any]]:
    """Mean squared gradient norm on the logistic task, averaged over runs, beside 2 Delta / (gamma K)."""
    task, p, batch = breast_cancer(), 0.2, 16
    x0 = torch.zeros(task.dim, dtype=torch.float64)
    excess = task.value(x0) - task.infimum
    settings: list[tuple[str, compressors.Compressor, float]] = [
        ("MARINA, rand-k, k = 6", compressors.RandK(k=6), 0.0),
        ("MARINA, stochastic int4", compressors.Codec("int4"), 0.0),
        ("MARINA, natural", compressors.Natural(), 0.0),
        ("VR-MARINA, rand-k, k = 6, batch 16", compressors.RandK(k=6), task.sample_variance / batch),
    ]
    cases, curves = [], {}
    for label, operator, variance in settings:
        omega = operator.omega((task.dim,), torch.float64)
        assert omega is not None
        gamma = 1 / (task.L + (rates.marina(omega, p, task.workers, task.L_tilde, variance) / p) ** 0.5)
        runs = torch.tensor([_run(operator, gamma, p, batch if variance else 0, seed * SEEDS + s) for s in range(SEEDS)])
        means = runs.mean(0).cumsum(0) / torch.arange(1, STEPS + 1)
        times = [round(1 + i * (STEPS - 1) / (POINTS - 1)) for i in range(POINTS)]
        curves[label] = {
            "gamma": gamma,
            "t": times,
            "mean": [float(means[t - 1]) for t in times],
            "bound": [2 * excess / (gamma * t) for t in times],
        }
        cases.append(Case(f"mean |grad f|^2, {label}", 2 * excess / (gamma * STEPS), float(means[-1])))
    return cases, curves


def _run(operator: compressors.Compressor, gamma: float, p: float, batch: int, seed: int) -> list[float]:
    """|grad f(x_t)|^2 of one run; exact gradients when ``batch`` is 0."""
    task = breast_cancer()
    method: VRMarina = VRMarina(operator, p, seed=seed) if batch else Marina(operator, p, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x, before = torch.zeros(task.dim, dtype=torch.float64), torch.zeros(task.dim, dtype=torch.float64)
    squared = []
    for _ in range(STEPS):
        rows = task.gradients(x)
        squared.append(float(rows.mean(0).square().sum()))
        if batch and not method.full:
            index = torch.randint(task.labels.shape[1], (task.workers, batch), generator=generator)
            estimate = method.step(list(task.sampled(x, index)), list(task.sampled(before, index)))
        else:
            estimate = method.step(list(rows))
        assert isinstance(estimate, Tensor)
        before, x = x, x - gamma * estimate
    return squared


def _robust_rate(seed: int) -> Case:
    """Bound (2) on the dealt logistic task (zeta > 0), exact gradients, 2 of 8 workers hostile; L+-^2 <= L_tilde^2."""
    everyone, p, hostile = breast_cancer(), 0.5, 2
    good = everyone.workers - hostile
    honest = Logistic(everyone.features[:good], everyone.labels[:good], everyone.lam)
    operator, trimmed, attack = compressors.RandK(k=15), aggregators.TrimmedMean(delta=0.25), attacks.LittleIsEnough(hostile, z=1.5)
    omega, certificate = operator.omega((everyone.dim,), torch.float64), trimmed.certificate(everyone.workers)
    assert omega is not None and certificate is not None
    c_delta = certificate[0] * certificate[1]
    gamma = 1 / (honest.L + rates.byzantine(omega, p, good, c_delta, honest.L_tilde, 0.0, honest.L_tilde**2) ** 0.5)
    zero = torch.zeros(everyone.dim, dtype=torch.float64)
    total, zeta2, e0 = 0.0, 0.0, 0.0
    for s in range(SEEDS):
        method, x, before = ByzVRMarina(operator, p, trimmed, seed=seed * SEEDS + s), zero, zero
        for step in range(STEPS):
            rows = everyone.gradients(x)
            mean = rows[:good].mean(0)
            total += float(mean.square().sum()) / (SEEDS * STEPS)
            zeta2 = max(zeta2, float((rows[:good] - mean).square().sum(1).mean()))
            estimate = method.step(list(rows), list(everyone.gradients(before)), attack=attack)
            assert isinstance(estimate, Tensor)
            e0 += 0.0 if step else float((estimate - mean).square().sum()) / SEEDS
            before, x = x, x - gamma * estimate
    excess = honest.value(zero) - honest.infimum
    bound = 2 * excess / (gamma * STEPS) + 2 * e0 / (p * STEPS) + 4 * good / (good - 1) * c_delta * zeta2
    return Case("mean |grad f|^2, Byz-VR-MARINA, trimmed under alie (z = 1.5), dealt data", bound, total)


def _biased(seed: int) -> Case:
    """Nearest-rounded NF4 in MARINA on f_i(x) = |x|^2 / 2 along a line: its errors point one way, so n workers do not average them.

    The bound is (1)'s without full rounds, with the variance that NF4 would have if its worst-case error had mean zero.
    """
    n, rounds = 8, 50
    nf4 = compressors.Codec("nf4", block=64)
    method = Marina(nf4, 1e-12, seed=seed, unsafe=True)
    change = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for t in range(rounds + 1):
        estimate = method.step([t * change] * n)
    assert isinstance(estimate, Tensor)
    omega = 1 - nf4.alpha((64,), torch.float64)
    bound = rounds * omega * float(change.square().sum()) / n
    return Case("nearest-rounded NF4 in MARINA, 50 rounds: |e|^2", bound, float((estimate - rounds * change).square().sum()))

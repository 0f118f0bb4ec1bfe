"""Judging a method by the gap between two controls, and saying so when no verdict is possible.

Two controls train beside every method: *dense* (the full method) and *frozen* (the layers under test do not train). A method recovers

    recovered = (loss_frozen - loss_method) / (loss_frozen - loss_dense)

of the gap, on the final test loss. A task whose gap is not at least ten times the seed-to-seed standard deviation of dense proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from mango.errors import ConfigError

GAP_FACTOR = 10.0  # the gap must be this many seed standard deviations of dense


@dataclass(frozen=True)
class Gap:
    """The dense-frozen gap of a task.

    Attributes:
        dense, frozen: mean final losses.
        value: frozen - dense.
        seed_std: standard deviation of dense over seeds (n - 1 in the denominator); None with fewer than two seeds.
        ratio: value / seed_std; None without seed_std, infinite when it is 0 and the gap is positive.
        reason: why the task allows no verdict; None when it does.
    """

    dense: float
    frozen: float
    value: float
    seed_std: float | None
    ratio: float | None
    reason: str | None

    @property
    def passed(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Recovered:
    """The share of the gap that a method recovers.

    Attributes:
        value: mean over seeds; None when there is no verdict.
        per_seed: seed -> share, each seed against its own controls' mean gap; empty when there is no verdict.
        std: standard deviation over seeds; None with fewer than two.
        reason: why there is no verdict; None when there is one.
    """

    value: float | None
    per_seed: dict[int, float]
    std: float | None
    reason: str | None


@dataclass(frozen=True)
class Paired:
    """A comparison over the seeds that both methods have.

    Attributes:
        difference: mean of a - b.
        interval: 95 % confidence interval of the mean (Student's t); None with fewer than two pairs.
        p_value: two-sided paired t-test; None with fewer than two pairs, or when every difference is the same.
        pairs: how many seeds.
        reason: why there is no test; None when there is one.
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float | None
    pairs: int
    reason: str | None


def gap(dense: Sequence[float], frozen: Sequence[float], factor: float = GAP_FACTOR) -> Gap:
    """Test whether a task can tell methods apart.

    Args:
        dense, frozen: final losses, one per seed.

    Raises: ConfigError when a control has no runs.
    """
    for name, losses in (("dense", dense), ("frozen", frozen)):
        if not losses:
            raise ConfigError.of(f"{name} losses", list(losses), "at least one run")
    if not all(map(math.isfinite, [*dense, *frozen])):
        return Gap(fmean(dense), fmean(frozen), math.nan, None, None, "a control's loss is not finite")
    value = fmean(frozen) - fmean(dense)
    deviation = stdev(dense) if len(dense) > 1 else None
    ratio = None if deviation is None else (value / deviation if deviation > 0 else math.copysign(math.inf, value))
    reason = None
    if value <= 0:
        reason = f"frozen ({fmean(frozen):.4g}) is no worse than dense ({fmean(dense):.4g}): the layers under test do not matter here"
    elif ratio is None:
        reason = "dense has one seed only: its seed-to-seed spread is unknown"
    elif ratio < factor:
        reason = f"the gap {value:.4g} is {ratio:.1f} times the seed standard deviation of dense, below {factor:g}"
    return Gap(fmean(dense), fmean(frozen), value, deviation, ratio, reason)


def recovered(method: Mapping[int, float], dense: Sequence[float], frozen: Sequence[float], factor: float = GAP_FACTOR) -> Recovered:
    """The share of the gap that a method recovers.

    Args:
        method: seed -> final loss.
        dense, frozen: final losses of the controls.
    """
    task = gap(dense, frozen, factor)
    if not method:
        return Recovered(None, {}, None, "the method has no runs")
    if task.reason is not None:
        return Recovered(None, {}, None, task.reason)
    if not all(map(math.isfinite, method.values())):
        return Recovered(None, {}, None, "a loss of the method is not finite")
    shares = {seed: (task.frozen - loss) / task.value for seed, loss in sorted(method.items())}
    return Recovered(fmean(shares.values()), shares, stdev(shares.values()) if len(shares) > 1 else None, None)


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    """Compare two methods seed by seed (a - b).

    Raises: ConfigError when they share no seed.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ConfigError.of("seeds", (sorted(a), sorted(b)), "at least one seed that both methods ran")
    differences = [a[seed] - b[seed] for seed in seeds]
    mean = fmean(differences)
    if not math.isfinite(mean):
        return Paired(mean, None, None, len(seeds), "a loss is not finite")
    if len(seeds) < 2:
        return Paired(mean, None, None, len(seeds), "one common seed only")
    error = stdev(differences) / math.sqrt(len(seeds))
    if error == 0:
        return Paired(mean, (mean, mean), None, len(seeds), "every seed gives the same difference")
    freedom = len(seeds) - 1
    p_value = 2 * _t_tail(abs(mean) / error, freedom)
    half = _t_quantile(0.975, freedom) * error
    return Paired(mean, (mean - half, mean + half), p_value, len(seeds), None)


def _t_tail(t: float, freedom: int) -> float:
    """P(T > t) for Student's t, t >= 0, integer degrees of freedom, by the finite sums of Abramowitz and Stegun 26.7.3-4."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine_squared = math.cos(theta) ** 2
    if freedom % 2 == 1:
        term = math.cos(theta)
        total = term if freedom > 1 else 0.0
        for k in range(3, freedom - 1, 2):
            term *= cosine_squared * (k - 1) / k
            total += term
        inside = 2 / math.pi * (theta + math.sin(theta) * total)
    else:
        term, total = 1.0, 1.0
        for k in range(2, freedom - 1, 2):
            term *= cosine_squared * (k - 1) / k
            total += term
        inside = math.sin(theta) * total
    return max(0.0, (1 - inside) / 2)


def _t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability, above one half, by bisection."""
    low, high = 0.0, 1.0
    while _t_tail(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_tail(middle, freedom) > 1 - probability else (low, middle)
    return high

"""Aggregators and attackers: a contract suite for each registry, the constants, what hostile workers do to a quadratic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mango import compressors
from mango.errors import ConfigError, NonFinite
from mango.feedback import ByzVRMarina, aggregators, attacks

# Aggregators

robust = pytest.mark.parametrize("name", [name for name in aggregators.REGISTRY if aggregators.REGISTRY.load(name).robust])


@pytest.mark.parametrize("name", aggregators.REGISTRY)
def test_aggregator_contract(name: str) -> None:
    aggregator = aggregators.get(name, delta=0.25)
    assert aggregator.name == name
    x = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result, shift = aggregator(x), torch.full((3, 5), 1e3, dtype=torch.float64)
    assert result.shape == (3, 5) and result.dtype == x.dtype
    assert torch.equal(aggregator(list(x)), result)
    assert torch.allclose(aggregator(x + shift), result + shift, rtol=0, atol=1e-6)  # MARINA's servers rely on it
    assert torch.allclose(aggregator(-2 * x), -2 * result, rtol=0, atol=1e-6)
    assert torch.allclose(aggregator(x[torch.randperm(8)]), result, rtol=0, atol=1e-6)
    assert torch.allclose(aggregator(shift.expand(8, -1, -1)), shift)
    assert torch.equal(aggregator(x[:1]), x[0])
    assert torch.isfinite(aggregator(x.float())).all()
    for bad, match in ((torch.zeros(()), "messages"), ([], "messages"), ([torch.zeros(2), torch.zeros(3)], "shape of worker 1")):
        with pytest.raises(ConfigError, match=match):
            aggregator(bad)
    with pytest.raises(ConfigError, match="device"):
        aggregator(torch.empty(4, 2, device="meta"), generator=torch.Generator())


@robust
def test_bad_arguments_of_aggregators(name: str) -> None:
    for delta in (0.5, 0.75, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="delta"):
            aggregators.get(name, delta=delta)
    with pytest.raises(ConfigError, match="bucket"):
        aggregators.get(name, bucket=0)
    with pytest.raises(ConfigError, match="2 attackers could spoil half of the 4 buckets"):
        aggregators.get(name, delta=0.25, bucket=2)(torch.randn(8, 3))


@robust
@given(seed=st.integers(0, 2**31), dim=st.integers(1, 4), n=st.integers(3, 9), scale=st.sampled_from([0.0, 0.5, 1.0, 1e3, 1e12]))
def test_aggregator_keeps_its_constant(name: str, seed: int, dim: int, n: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    f = int(torch.randint(0, (n + 1) // 2, (), generator=generator))
    aggregator = aggregators.get(name, delta=f / n)
    assert aggregator.attackers(n) == f
    rows = torch.randn(n, dim, generator=generator, dtype=torch.float64) ** 3
    rows[n - f :] = scale * torch.randn(1, dim, generator=generator, dtype=torch.float64)
    good = rows[: n - f]
    v = (good - good.mean(0)).square().sum(1).mean()
    error = (aggregator(rows) - good.mean(0)).square().sum()
    assert error <= aggregator.kappa(n, f) * v * (1 + 1e-6) + 1e-20
    certificate = aggregator.certificate(n)
    if certificate is not None and f:
        delta, c = certificate
        pairs = sum(float((a - b).square().sum()) for a in good for b in good) / ((n - f) * (n - f - 1))
        assert delta == f / n and error <= c * delta * pairs * (1 + 1e-6) + 1e-20


@robust
def test_buckets_keep_their_constant(name: str) -> None:
    """The mean over many shuffles, attackers at a point that hurts."""
    aggregator = aggregators.get(name, delta=1 / 6, bucket=2)
    kappa = aggregator.kappa(12, 2)
    assert kappa is not None and aggregators.get(name, bucket=5).kappa(12, 1) is None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    for place in (2.0, 1e6):
        rows[10:] = place
        good = rows[:10]
        error = sum(float((aggregator(rows, generator=generator) - good.mean(0)).square().sum()) for _ in range(80)) / 80
        assert error <= kappa * float((good - good.mean(0)).square().sum(1).mean())


def test_known_constants() -> None:
    certificates = {name: aggregators.get(name).certificate(8) for name in aggregators.REGISTRY}
    assert certificates["mean"] is None and aggregators.Mean(delta=0.0).certificate(8) == (0.0, 0.0)
    assert certificates["trimmed"] == pytest.approx((0.25, 0.5 * 5 / 12 / 0.25))
    assert certificates["median"] == pytest.approx((0.25, 1.0 * 5 / 12 / 0.25))
    assert certificates["rfa"] == pytest.approx((0.25, 9.0 * 5 / 12 / 0.25))
    assert aggregators.CentredClipping(radius=1.0).certificate(8) is None
    assert aggregators.CoordinateMedian(delta=0.0).certificate(8) is None


@robust
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_non_finite_messages_are_dropped_and_counted(name: str, bad: float) -> None:
    aggregator = aggregators.get(name, delta=0.25)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[1] = bad
    x[6, 2] = bad
    result = aggregator(x)
    assert aggregator.dropped == 2 and torch.equal(result, aggregators.get(name, delta=0.0)(x[[0, 2, 3, 4, 5, 7]]))
    x[:4] = torch.nan
    with pytest.raises(NonFinite, match="5 of 8"):
        aggregator(x)


def test_mean_shows_what_a_nan_does() -> None:
    x = torch.ones(8, 2)
    x[3, 0] = torch.nan
    assert torch.isnan(aggregators.Mean()(x)[0])


def test_huge_attackers_in_float32() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    x[6:] = 3e38
    for name in aggregators.REGISTRY:
        result = aggregators.get(name)(x)
        assert name == "mean" or result.abs().max() < 10, name


def test_geometric_median_is_a_minimum() -> None:
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z = aggregators.RFA(iterations=1000)(x)
    pull = (x - z) / (x - z).norm(dim=1, keepdim=True)
    assert pull.sum(0).norm() < 1e-4
    for options in ({"iterations": 0}, {"smoothing": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            aggregators.RFA(**options)
    with pytest.raises(ConfigError, match="radius"):
        aggregators.CentredClipping(radius=0.0)


# Attacks


@pytest.mark.parametrize("name", attacks.REGISTRY)
def test_attack_contract(name: str) -> None:
    attack = attacks.get(name, attackers=2)
    assert attack.name == name and attack.attackers == 2
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    sent = attack(x)
    assert torch.equal(x, before) and sent.shape == x.shape and sent.dtype == x.dtype and torch.equal(sent[:6], x[:6])
    y = torch.tensor([-1.0, 1.0, 1.0])
    assert torch.equal(attack.labels(y), -y if name == "labelflip" else y)
    for bad in (torch.zeros(2, 5), torch.zeros(8)):
        with pytest.raises(ConfigError, match="messages"):
            attack(bad)
    with pytest.raises(ConfigError, match="attackers"):
        attacks.get(name, attackers=0)


def test_what_attackers_send() -> None:
    x = torch.tensor([[1.0], [3.0], [10.0]])
    assert attacks.SignFlip(1, scale=2.0)(x)[2].item() == -20.0
    assert attacks.InnerProduct(1, epsilon=0.5)(x)[2].item() == -1.0
    assert attacks.LittleIsEnough(1, z=1.5)(x)[2].item() == 0.5
    assert attacks.LabelFlip(1)(x)[2].item() == 10.0
    assert attacks.NaN(1)(x)[2].isnan().item()
    assert attacks.LabelFlip(1, classes=10).labels(torch.tensor([0, 3, 9])).tolist() == [9, 6, 0]
    with pytest.raises(ConfigError, match="classes"):
        attacks.LabelFlip(1, classes=1)


@robust
@pytest.mark.parametrize("attack", [name for name in attacks.REGISTRY if name != "labelflip"])
@pytest.mark.parametrize("bucket", [1, 2])
def test_hostile_workers_do_not_stop_a_quadratic(name: str, attack: str, bucket: int) -> None:
    """12 workers, 2 hostile, f_i(x) = |x|^2 / 2 with noisy samples: the robust methods reach what the mean reaches without attack."""

    def final(aggregator: aggregators.Aggregator, hostile: attacks.Attack | None, workers: int) -> float:
        method = ByzVRMarina(compressors.RandK(k=4), 0.3, aggregator)
        generator = torch.Generator().manual_seed(0)
        x, before = torch.ones(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
        for _ in range(80):
            weights = 0.5 + torch.rand(workers, 1, generator=generator, dtype=torch.float64)  # of a sampled curvature, mean 1
            rows = list(x.expand(workers, -1)) if method.full else list(weights * x)
            estimate = method.step(rows, list(weights * before), attack=hostile)
            before, x = x, x - 0.3 * estimate
            if not torch.isfinite(x).all():
                return float("inf")
        return float(x.norm())

    free = final(aggregators.Mean(), None, 10)
    assert final(aggregators.get(name, delta=1 / 6, bucket=bucket), attacks.get(attack, attackers=2), 12) < 10 * max(free, 1e-6)


@pytest.mark.parametrize("attack", ["signflip", "ipm", "alie", "nan"])
def test_hostile_workers_break_the_mean(attack: str) -> None:
    method = ByzVRMarina(compressors.RandK(k=4), 0.3, aggregators.Mean())
    hostile = attacks.get(attack, attackers=2)
    x = torch.full((8,), 1.0, dtype=torch.float64)
    before = x
    for _ in range(40):
        weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)[:, None]
        rows = list(weights * x) if attack == "alie" or not method.full else list(x.expand(8, -1))
        estimate = method.step(rows, list(weights * before), attack=hostile)
        before, x = x, x - 0.3 * estimate
        if not torch.isfinite(x).all():
            break
    assert not x.norm() < 1.0

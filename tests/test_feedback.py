"""Feedback methods, aggregators and attacks: a contract suite for each registry, closed forms, bad input."""

from __future__ import annotations

import io
from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mango import compressors, feedback
from mango.errors import ConfigError, NonFinite
from mango.feedback import EF21, EF21SGDM, ByzVRMarina, Feedback, Marina, VRMarina, aggregators, attacks, rates
from mango.packed import Packed

SHAPES = [(6, 4), (5,)]


def make(name: str, seed: int = 0, **options: Any) -> Feedback:
    """A method of the registry with a compressor that it admits."""
    if name.startswith("ef21"):
        return feedback.get(name, compressor=options.pop("compressor", compressors.TopK(k=0.5)), seed=seed, **options)
    if name == "byzvrmarina":
        options.setdefault("aggregator", aggregators.TrimmedMean(delta=0.25))
    return feedback.get(name, compressor=options.pop("compressor", compressors.RandK(k=0.5)), probability=0.3, seed=seed, **options)


def gradients(workers: int, round_: int, single: bool = False, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(1000 + round_)
    rows = [[torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES] for _ in range(workers)]
    return [row[0] for row in rows] if single else rows


def arguments(name: str, round_: int, workers: int = 4, single: bool = False) -> tuple[Any, ...]:
    """What step takes: VR methods also the gradients at the point before."""
    new = gradients(workers, round_, single)
    return (new,) if name in ("ef21", "ef21sgdm", "marina") else (new, gradients(workers, round_ - 1, single))


def flat(estimate: Any) -> Tensor:
    return estimate.reshape(-1) if isinstance(estimate, Tensor) else torch.cat([part.reshape(-1) for part in estimate])


def tensors_of(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return [tensor for value in state for tensor in tensors_of(value)] if isinstance(state, list) else []


METHODS = [
    *((name, {}) for name in feedback.REGISTRY),
    ("ef21", {"state": "bf16"}),
    ("ef21", {"state": "int8"}),
    ("ef21", {"state": "int4", "unsafe": True}),
    ("ef21sgdm", {"state": "nf4", "compressor": compressors.Codec("int8")}),
    ("ef21", {"compressor": compressors.LRQ(rank=0.5, codec="nf4", scouts=1)}),
    ("ef21", {"compressor": compressors.LowRank(rank=0.5, method="power", scouts=1)}),
    ("vrmarina", {"compressor": compressors.Codec("int4")}),
    ("byzvrmarina", {"aggregator": aggregators.Krum(delta=0.1, bucket=2)}),
]
every_method = pytest.mark.parametrize(("name", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else "-".join(value))


@every_method
def test_estimate_has_the_gradients_structure(name: str, options: dict[str, Any]) -> None:
    as_list = make(name, **options).step(*arguments(name, 0))
    assert isinstance(as_list, list) and [tuple(part.shape) for part in as_list] == SHAPES
    single = make(name, **options)
    estimate = single.step(*arguments(name, 0, single=True))
    assert isinstance(estimate, Tensor) and estimate.shape == SHAPES[0] and torch.equal(estimate, single.estimate)
    estimate.zero_()  # the caller's to change
    assert single.estimate.abs().sum() > 0


@every_method
def test_ranks_agree_with_one_process(name: str, options: dict[str, Any]) -> None:
    """Each rank makes its own message and absorbs all: the estimates are those of one object that plays all workers."""
    together, ranks = make(name, **options), [make(name, **options) for _ in range(3)]
    for round_ in range(6):
        given_ = arguments(name, round_, workers=3)
        expected = flat(together.step(*given_))
        messages = [rank.message(*(argument[i] for argument in given_), worker=i) for i, rank in enumerate(ranks)]
        for rank in ranks:
            assert torch.equal(flat(rank.absorb(messages)), expected)


@every_method
def test_resumes_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    first = make(name, **options)
    for round_ in range(4):
        first.step(*arguments(name, round_))
    state = first.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    second = make(name, **options)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert first.nbytes() == second.nbytes() == sum(tensor.nbytes for tensor in tensors_of(state)) > 0
    for round_ in range(4, 9):
        assert torch.equal(flat(first.step(*arguments(name, round_))), flat(second.step(*arguments(name, round_))))


@every_method
def test_seed_fixes_every_draw(name: str, options: dict[str, Any]) -> None:
    runs = [make(name, **options) for _ in range(2)]
    for round_ in range(4):
        results = [flat(run.step(*arguments(name, round_))) for run in runs]
        assert torch.equal(*results)


@every_method
def test_bad_gradients_are_refused_before_anything_changes(name: str, options: dict[str, Any]) -> None:
    method = make(name, **options)
    method.step(*arguments(name, 0))
    before = [tensor.clone() for tensor in tensors_of(method.state_dict())]

    def unchanged() -> bool:
        return all(torch.equal(a, b) for a, b in zip(before, tensors_of(method.state_dict()), strict=True))

    spoiled = arguments(name, 1)
    spoiled[0][2][1] = torch.zeros(7)
    with pytest.raises(ConfigError, match="shapes of worker 2"):
        method.step(*spoiled)
    assert unchanged()
    spoiled = arguments(name, 1)
    spoiled[0][0][0][1, 1] = torch.nan
    with pytest.raises(NonFinite, match="gradient 0 of worker 0"):
        method.message(*(argument[0] for argument in spoiled), worker=0)
    assert unchanged()
    method.message(*(argument[0] for argument in arguments(name, 1)), worker=0)
    with pytest.raises(ConfigError, match="one message a round"):
        method.message(*(argument[0] for argument in arguments(name, 1)), worker=0)


@pytest.mark.parametrize("name", feedback.REGISTRY)
def test_bad_arguments_of_methods(name: str) -> None:
    assert feedback.REGISTRY.load(name).name == name
    with pytest.raises(ConfigError, match="compressor"):
        make(name, compressor="topk")
    with pytest.raises(ConfigError, match="one message per worker"):
        make(name).absorb([])
    with pytest.raises(ConfigError, match="gradients"):
        make(name).step(torch.zeros(3))
    with pytest.raises(ConfigError, match="floating-point"):
        make(name).step([torch.zeros(3, dtype=torch.int64)])


def test_exact_communication_is_the_mean_gradient() -> None:
    for method in (EF21(compressors.Identity()), Marina(compressors.Identity(), 0.2), EF21SGDM(compressors.Identity(), momentum=1.0)):
        for round_ in range(4):
            rows = gradients(3, round_, single=True, dtype=torch.float64)
            assert torch.allclose(method.step(rows), torch.stack(rows).mean(0), rtol=0, atol=1e-12)


def test_ef21_by_hand() -> None:
    method = EF21(compressors.TopK(k=1), state="fp32")
    assert method.step([torch.tensor([3.0, 2.0]), torch.tensor([1.0, -4.0])]).tolist() == [1.5, -2.0]
    assert method.step([torch.tensor([3.0, 2.0]), torch.tensor([5.0, -4.0])]).tolist() == [4.0, -1.0]
    assert method.tracked(0)[0].tolist() == [3.0, 2.0] and method.tracked(1)[0].tolist() == [5.0, -4.0]


def test_ef21_keeps_bf16_gradients_in_fp32() -> None:
    method = EF21(compressors.TopK(k=1.0))
    rows = [torch.randn(64, dtype=torch.bfloat16) for _ in range(3)]
    assert method.step(rows).dtype == torch.float32 == method.tracked(0)[0].dtype


def test_momentum_by_hand() -> None:
    method = EF21SGDM(compressors.Identity(), momentum=0.25)
    values = [method.step([torch.tensor([g], dtype=torch.float64)]).item() for g in (8.0, 0.0, 4.0)]
    assert values == [8.0, 6.0, 5.5]
    for momentum in (0.0, 1.5):
        with pytest.raises(ConfigError, match="momentum"):
            EF21SGDM(compressors.Identity(), momentum=momentum)


def test_momentum_averages_minibatch_noise_away() -> None:
    """f = |x|^2 / 2 seen through unit noise, top-1 of 20: EF21 follows the noise, EF21 with momentum does not."""

    def final(method: Feedback) -> float:
        generator = torch.Generator().manual_seed(3)
        x, tail = torch.ones(20, dtype=torch.float64), []
        for step in range(400):
            noise = torch.randn(4, 20, generator=generator, dtype=torch.float64)
            x = x - 0.02 * method.step(list(x + noise))
            tail.append(float(x.square().sum())) if step >= 200 else None
        return sum(tail) / len(tail)

    assert final(EF21SGDM(compressors.TopK(k=1), momentum=0.02)) < 0.5 * final(EF21(compressors.TopK(k=1)))


def test_use_switches_between_rounds() -> None:
    method = EF21(compressors.TopK(k=1))
    rows = [torch.tensor([3.0, 2.0, 1.0])]
    method.step(rows)
    method.use(compressors.Identity())
    assert method.step(rows).tolist() == rows[0].tolist()
    with pytest.raises(ConfigError, match="unbiased"):
        Marina(compressors.RandK(), 0.5).use(compressors.TopK(k=1))


@pytest.mark.parametrize(
    ("operator", "state", "admitted"),
    [
        (compressors.TopK(k=0.5), "int8", True),
        (compressors.TopK(k=0.05), "int8", False),
        (compressors.LowRank(rank=1), "int8", False),
        (compressors.LowRank(rank=1), "fp32", True),
        (compressors.TopK(k=0.95), "nf4", True),
        (compressors.TopK(k=0.5), "nf4", False),
        (compressors.TopK(k=0.1), "bf16", True),
        (compressors.RandK(k=0.25), "fp32", False),  # unbiased with omega = 3: no contraction
        (compressors.LowRank(rank=2, method="power", scouts=0), "fp32", False),  # the warm step has no certificate
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_quantised_state_needs_the_theorem(operator: compressors.Compressor, state: str, admitted: bool) -> None:
    gradient = torch.randn(32, 40, generator=torch.Generator().manual_seed(0))
    method = EF21(operator, state=state)
    verdict = method.admission((32, 40))
    assert verdict.admissible is admitted
    if admitted:
        method.step([gradient])
        return
    with pytest.raises(ConfigError) as refusal:
        method.step([gradient])
    for number in (f"a = {verdict.a:.4g}", f"kappa = {verdict.kappa:.4g}", "unsafe=True"):
        assert number in str(refusal.value)
    assert EF21(operator, state=state, unsafe=True).step([gradient]).shape == (32, 40)


def test_admission_is_the_theorems_formula() -> None:
    alpha, rho = 0.5, sqrt(1 - 0.9970686940)
    verdict = rates.quantised_state(alpha, rho)
    a = (1 + rho) * sqrt(1 - alpha)
    assert verdict.a == a and verdict.kappa == 2 * rho**2 / (1 - a) ** 2 and verdict.admissible
    assert not rates.quantised_state(0.1, rho).admissible and rates.quantised_state(0.05, rho).kappa == float("inf")


def test_quantised_state_is_smaller() -> None:
    rows = [torch.randn(4096, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    sizes = {}
    for state in ("fp32", "bf16", "int8"):
        method = EF21(compressors.TopK(k=0.5), state=state)
        method.step(rows)
        sizes[state] = method.nbytes() - rows[0].nbytes  # without the estimate
    assert sizes["fp32"] == 2 * 16384 and sizes["bf16"] == 2 * 8192 and sizes["int8"] < 2 * 4200


def test_marina_coin_and_previous() -> None:
    ranks = [VRMarina(compressors.RandK(k=0.5), 0.25, seed=7) for _ in range(2)]
    coins = []
    for round_ in range(2000):
        for rank in ranks:
            rank.round = round_
        assert ranks[0].full is ranks[1].full
        coins.append(ranks[0].full)
    assert coins[0] and abs(sum(coins[1:]) / 1999 - 0.25) < 5 * sqrt(0.25 * 0.75 / 1999)

    method = VRMarina(compressors.RandK(k=0.5), 1e-9)
    method.step(gradients(2, 0))
    with pytest.raises(ConfigError, match="previous"):
        method.step(gradients(2, 1))
    with pytest.raises(ConfigError, match="previous"):
        method.step(gradients(2, 1), gradients(3, 0))
    with pytest.raises(ConfigError, match="previous"):
        Marina(compressors.RandK(k=0.5), 0.5).step(gradients(2, 1), gradients(2, 0))


@pytest.mark.parametrize("kind", [Marina, VRMarina, ByzVRMarina])
def test_marina_refuses_biased_compressors(kind: type[VRMarina]) -> None:
    options: dict[str, Any] = {"aggregator": aggregators.CoordinateMedian()} if kind is ByzVRMarina else {}
    for biased in (compressors.TopK(k=2), compressors.Codec("nf4"), compressors.RandK(k=2, scaled=False)):
        with pytest.raises(ConfigError, match="unbiased"):
            kind(biased, 0.5, **options)
        kind(biased, 0.5, unsafe=True, **options)
    for p in (0.0, 1.5):
        with pytest.raises(ConfigError, match="probability"):
            kind(compressors.RandK(k=2), p, **options)
    with pytest.raises(ConfigError, match="aggregator"):
        ByzVRMarina(compressors.RandK(k=2), 0.5, "median")  # type: ignore[arg-type]


def test_marina_messages_are_compressed() -> None:
    method = Marina(compressors.RandK(k=8), 1e-9)
    rows = [torch.randn(256) for _ in range(2)]
    sizes = []
    for _ in range(2):
        messages = [method.message(row, worker=i) for i, row in enumerate(rows)]
        assert all(isinstance(message, Packed) for message in messages)
        sizes.append(messages[0].nbytes)  # type: ignore[union-attr]
        method.absorb(messages)
    assert sizes == [1024, 8 * (4 + 1)]


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

"""Feedback methods: the contract suite of their registry, closed forms, bad input."""

from __future__ import annotations

import io
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from mango import compressors, feedback
from mango.errors import ConfigError, NonFinite
from mango.feedback import EF21, EF21SGDM, ByzVRMarina, Feedback, Marina, VRMarina, aggregators, rates
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

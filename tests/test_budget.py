"""The exact choice of plans under a budget: the optimum of brute force, never a byte above, and one line when there is none."""

from __future__ import annotations

import itertools
import random
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mango import LayerPlan, Mango
from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes
from mango.optim.plan import is_matrix
from mango.policy import Budget
from mango.policy.budget import LADDER, choose, parse_budget, plans_for, quality
from mango.policy.knapsack import solve

options = st.lists(st.tuples(st.integers(0, 30), st.floats(-10, 100, allow_nan=False)), min_size=1, max_size=4)


def brute(classes: list[list[tuple[int, float]]], capacity: int) -> tuple[float, int] | None:
    """(largest value, least weight at that value) over all choices, in exact arithmetic."""
    from fractions import Fraction

    best = None
    for choice in itertools.product(*classes):
        weight, value = sum(w for w, _ in choice), sum((Fraction(v) for _, v in choice), Fraction(0))
        if weight <= capacity and (best is None or (value, -weight) > best):
            best = (value, -weight)
    return best


# ---------------------------------------------------------------- the knapsack


@settings(max_examples=100, deadline=None)
@given(st.lists(options, max_size=3), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 150))
def test_knapsack_is_the_optimum_of_brute_force(classes: list[list[tuple[int, float]]], again: list[int], capacity: int) -> None:
    classes = classes + [classes[place] for place in again if place < len(classes)]  # equal classes share the relaxation
    chosen, best = solve(classes, capacity), brute(classes, capacity)
    if best is None:
        assert chosen is None
        return
    assert chosen is not None
    taken = [options[index] for options, index in zip(classes, chosen, strict=True)]
    assert brute([[option] for option in taken], capacity) == best


@settings(max_examples=30, deadline=None)
@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 150), st.randoms(use_true_random=False))
def test_knapsack_does_not_depend_on_the_order_of_different_classes(
    classes: list[list[tuple[int, float]]], capacity: int, order: random.Random
) -> None:
    def worth(chosen: list[int] | None, of: list[list[tuple[int, float]]]) -> object:
        return chosen and sorted(options[index] for options, index in zip(of, chosen, strict=True))

    distinct = [[(w, v + 1000.0 * place) for w, v in options] for place, options in enumerate(classes)]
    shuffled = list(distinct)
    order.shuffle(shuffled)
    first, second = solve(distinct, capacity), solve(shuffled, capacity)
    assert first == solve(distinct, capacity)
    if first is not None:
        assert second is not None
        total = [sum(of[i][index][0] for i, index in enumerate(chosen)) for of, chosen in ((distinct, first), (shuffled, second))]
        assert total[0] == total[1]
        assert brute([[o[i]] for o, i in zip(distinct, first, strict=True)], capacity) == brute(
            [[o[i]] for o, i in zip(shuffled, second, strict=True)], capacity
        )


def test_among_equals_the_lightest_the_first_and_the_earlier_layers() -> None:
    assert solve([[(3, 1.0), (2, 1.0), (2, 1.0)]], 9) == [1]
    assert solve([[(0, 0.0), (5, 1.0)]] * 3, 10) == [1, 1, 0]
    assert solve([], 0) == []
    assert solve([[(1, 0.0)]], 0) is None


def test_values_that_floats_cannot_add_are_told_apart() -> None:
    """1e16 + 1 = 1e16 in float64: the better option must still win."""
    assert solve([[(0, 1e16), (1, 1e16)], [(0, 0.0), (1, 1.0)]], 1) == [0, 1]


def test_a_model_of_hundreds_of_layers_that_all_differ_is_solved_quickly() -> None:
    """Brute force is out of reach: the value must lie within the linear relaxation's gap, the largest single step."""
    rng = random.Random(0)
    classes = []
    for _ in range(60):
        size = rng.choice([4096, 16384, 65536]) * rng.randint(1, 16)
        rates = sorted(rng.random() for _ in range(8))
        classes.append([(int(size * rate), size * rate**0.5) for rate in rates])
    capacity = sum(options[3][0] for options in classes)
    chosen = solve(classes, capacity)
    assert chosen is not None
    weight = sum(options[index][0] for options, index in zip(classes, chosen, strict=True))
    assert weight <= capacity
    assert capacity - weight < 4096, "the optimum leaves less room than the smallest layer has values"


def test_a_subset_sum_stays_bounded_and_within_its_stated_part() -> None:
    """Values in proportion to weights leave nothing to prune; the capacity itself bounds the optimum."""
    rng = random.Random(0)
    classes = [[(0, 0.0)] + [(weight, float(weight)) for weight in rng.sample(range(1, 10**6), 4)] for _ in range(40)]
    capacity = 10**7 + 1
    chosen = solve(classes, capacity)
    assert chosen is not None
    weight = sum(options[index][0] for options, index in zip(classes, chosen, strict=True))
    assert capacity * (1 - 1e-4) <= weight <= capacity


# ---------------------------------------------------------------- budgets as text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (123456, 123456),
        (2.5e3, 2500),
        ("123456", 123456),
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("800MB", 800 * 10**6),
        ("0.1GB", 10**8),
        ("1.5KiB", 1536),
        ("1e3 kB", 10**6),
        ("7B", 7),
        (" 3 bytes ", 3),
        ("0.5 bytes/param", 50),
        ("0.5B/parameter", 50),
        ("0.333 bytes / param", 33),
    ],
)
def test_budgets_are_read(text: int | float | str, expected: int) -> None:
    assert parse_budget(text, 100) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "24GiBs", "-3MB", "1/param", "24 G", "0.5 bytes/", "nan", -1, float("inf"), float("nan"), True, None]
)
def test_what_is_no_budget_is_refused_by_name(text: object) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget = .* is not legal: bytes as a number"):
        parse_budget(text, 100, field="memory_budget")  # type: ignore[arg-type]


def test_bytes_per_parameter_need_parameters() -> None:
    with pytest.raises(ConfigError, match="how many parameters"):
        parse_budget("0.5 bytes/param")


# ---------------------------------------------------------------- plans


def rungs() -> list[LayerPlan]:
    return [
        LayerPlan(rank=1 / 2, error="gradient"),
        LayerPlan(),
        LayerPlan(rank=4, error="none"),
        LayerPlan(rank=1 / 16, moment_codec="nf4"),
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([(64, 64), (64, 256), (100, 50), (16, 32, 3, 3)]), min_size=1, max_size=4),
    st.floats(0.05, 6.0),
    st.integers(0, 3),
)
def test_choice_is_the_optimum_of_brute_force_over_real_layers(shapes: list[tuple[int, ...]], rate: float, seed: int) -> None:
    layers = {f"layer{place}": shape for place, shape in enumerate(shapes)}
    rng = random.Random(seed)
    weights = {name: rng.choice([1.0, 1.0, 2.0]) for name in layers}

    def score(name: str, shape: tuple[int, ...], plan: LayerPlan) -> float:
        return weights[name] * quality(name, shape, plan)

    limit = int(rate * sum(map(prod, shapes)))
    classes = [[(layer_nbytes(shape, plan), score(name, shape, plan)) for plan in rungs()] for name, shape in layers.items()]
    best = brute(classes, limit)
    if best is None:
        with pytest.raises(ConfigError, match=f"at least {sum(min(w for w, _ in options) for options in classes)} bytes"):
            choose(layers, rungs(), limit, score)
        return
    plans = choose(layers, rungs(), limit, score)
    assert list(plans) == list(layers)
    picked = [[(layer_nbytes(layers[name], plan), score(name, layers[name], plan))] for name, plan in plans.items()]
    assert brute(picked, limit) == best


def random_model(rng: random.Random) -> nn.Module:
    """A few layers of random kinds and shapes, with vectors, small matrices and frozen weights among them."""
    width = rng.choice([48, 64, 96])
    kinds = [
        lambda: nn.Linear(width, rng.choice([64, 130, 256])),
        lambda: nn.Conv2d(rng.choice([16, 24]), rng.choice([16, 32]), 3),
        lambda: nn.Embedding(rng.choice([100, 257]), width),
        lambda: nn.LayerNorm(width),
        lambda: nn.Linear(8, 8),
        lambda: nn.LSTM(width, 40),
    ]
    model = nn.Sequential(nn.Linear(width, width), *(rng.choice(kinds)() for _ in range(rng.randint(1, 6))))
    if rng.random() < 0.3:
        model[-1].requires_grad_(False)
    if rng.random() < 0.3:
        tied = nn.Linear(width, width)
        tied.weight = model[0].weight
        model.append(tied)
    return model


def optimizer_with(model: nn.Module, plans: dict[str, LayerPlan]) -> Mango:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return Mango([{"params": [(name, parameter)], "plan": plans.get(name)} for name, parameter in named])


@pytest.mark.parametrize("seed", range(50))
def test_a_real_optimizer_never_exceeds_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = random_model(rng)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    count = sum(parameter.numel() for parameter in trainable.values())
    plain = sum(8 * parameter.numel() for parameter in trainable.values() if not is_matrix(parameter.shape))
    budget = rng.choice([f"{plain + int(rng.uniform(0.2, 3.0) * count)} B", f"{plain / count + rng.uniform(0.2, 3.0):.4f} bytes/param"])
    plans = plans_for(model.named_parameters(), budget)
    assert set(plans) == {name for name, parameter in trainable.items() if is_matrix(parameter.shape)}
    optimizer = optimizer_with(model, plans)
    for parameter in trainable.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert optimizer.nbytes() == sum(layer_nbytes(parameter.shape, plans.get(name)) for name, parameter in trainable.items())
    assert optimizer.nbytes() <= parse_budget(budget, count)


def test_an_infeasible_budget_names_the_smallest_that_is_not() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128))
    with pytest.raises(
        ConfigError, match=r"memory_budget = '10 B' is not legal: at least (\d+) bytes, of which 3072 for tensors"
    ) as caught:
        plans_for(model.named_parameters(), "10 B", field="memory_budget")
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert plans_for(model.named_parameters(), least)
    with pytest.raises(ConfigError):
        plans_for(model.named_parameters(), least - 1)


def test_groups_gather_layers_of_one_plan_and_meet_the_budget() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.LayerNorm(64))
    model[0].weight.requires_grad_(False)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    groups = Budget("1.2 bytes/param").groups(model.named_parameters())
    assert len({id(group["plan"]) for group in groups}) == len(groups) < 6
    assert sum(parameter.numel() for group in groups for _, parameter in group["params"]) == count
    optimizer = Mango(groups)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert optimizer.nbytes() <= 1.2 * count


def test_more_memory_is_never_worse_and_enough_memory_takes_the_best() -> None:
    named = dict(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 512), nn.Linear(512, 100)).named_parameters())
    worths = []
    for rate in (0.3, 0.5, 0.7, 1.0, 2.0, 4.0, 100.0):
        plans = Budget(f"{rate} bytes/param").plans(named.items())
        worths.append(sum(quality(name, named[name].shape, plan) for name, plan in plans.items()))
    assert worths == sorted(worths)
    assert all(
        quality(name, named[name].shape, plan) == max(quality(name, named[name].shape, rung) for rung in LADDER)
        for name, plan in plans.items()
    )


def test_measured_scores_replace_the_prior() -> None:
    layers = {"flat": (128, 128), "steep": (128, 128)}
    small, large = LayerPlan(rank=4, error="none"), LayerPlan(rank=32, error="none")
    measured = {("flat", 4): 0.2, ("flat", 32): 0.8, ("steep", 4): 0.9, ("steep", 32): 0.95}
    budget = layer_nbytes((128, 128), small) + layer_nbytes((128, 128), large)
    plans = choose(layers, [small, large], budget, score=lambda name, shape, plan: measured[name, int(plan.rank)])
    assert plans == {"flat": large, "steep": small}


def test_candidates_that_do_not_fit_are_left_out_and_bad_ones_refused() -> None:
    layers = {"wide": (64, 1024), "square": (256, 256)}
    plans = choose(layers, [LayerPlan(rank=128), {"rank": 16}], "10MB")
    assert plans["wide"].rank == 16
    with pytest.raises(ConfigError, match="candidates"):
        choose(layers, [LayerPlan(rank=128)], "10MB")
    with pytest.raises(ConfigError, match="candidates"):
        choose(layers, [], "10MB")
    with pytest.raises(ConfigError, match="finite"):
        choose(layers, LADDER, "10MB", score=lambda *_: float("nan"))
    with pytest.raises(ConfigError, match="shape of bias"):
        choose({"bias": (4096,)}, LADDER, "10MB")
    with pytest.raises(ConfigError, match="budget = 'much'"):
        Budget("much")


def test_quality_is_a_share_of_the_parameters_and_grows_with_rank_and_memory() -> None:
    shape = (256, 512)
    worth = [quality("x", shape, LayerPlan(rank=rank, error="none")) for rank in (1, 4, 16, 64, 256)]
    assert worth == sorted(worth)
    kept = [quality("x", shape, LayerPlan(error=error)) for error in ("none", "codec", "gradient")]
    assert kept == sorted(kept)
    assert worth[0] > 0 and max(*worth, *kept) <= prod(shape)

"""Policies: one contract for every registered one, the mask, the budget, Mango that follows them, and files that are refused."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from mango import LayerPlan, Mango, policy
from mango.errors import ConfigError
from mango.feedback import rates
from mango.policy import store
from mango.policy.actions import Actions, certified, check, choose
from mango.policy.base import LAYER, Observation, Policy, step_condition
from mango.policy.knapsack import solve
from mango.policy.observe import observe
from mango.policy.rules import Heuristic, RankSchedule, Static, Uniform
from mango.policy.tinyformer import PARAMETERS, Batch, LSTMPolicy, Normaliser, TinyFormer

SHAPES = [(64, 64), (64, 128), (128, 64), (32, 16, 3, 3), (4, 64, 64)]
SEEN = {"norm": 0.7, "variance": 0.4, "cosine": 0.6, "energy": 0.7, "drift": 0.9, "error_ratio": 1.4}


def seen(count: int = 5, share: float | None = None, energy: float | None = None) -> Observation:
    """An observation of so many layers, with a share of the bytes between the smallest and the largest plans as budget."""
    layers = {f"layer{place}": (SHAPES[place % len(SHAPES)], LayerPlan(), LayerPlan()) for place in range(count)}
    told = {name: {**SEEN, "energy": 0.3 + 0.6 * place / count if energy is None else energy} for place, name in enumerate(layers)}
    found = observe(Actions(), layers, told, {"progress": 0.5, "loss_slope": -0.1})
    if share is None:
        return found
    low, high = int(found.nbytes.amin(1).sum()), int(found.nbytes.amax(1).sum())
    return dataclasses.replace(found, budget=low + int(share * (high - low)))


# ---------------------------------------------------------------- the contract


@pytest.fixture(params=sorted(policy.REGISTRY))
def registered(request: pytest.FixtureRequest) -> Policy:
    return policy.REGISTRY.get(request.param)


@pytest.mark.parametrize("share", [None, 0.0, 0.01, 0.1, 0.5, 1.0])
def test_every_policy_answers_within_mask_and_budget(registered: Policy, share: float | None) -> None:
    observation = seen(share=share)
    check(registered.decide(observation), observation.nbytes, observation.allowed, observation.budget)


def test_every_policy_is_deterministic_and_equivariant(registered: Policy) -> None:
    """Without a budget; under one, layers that tie may swap."""
    observation, order = seen(7), [3, 0, 6, 2, 5, 1, 4]
    choice = registered.decide(observation)
    assert registered.decide(observation) == choice
    turned = registered.decide(observation.permuted(order))
    assert turned == [choice[place] for place in order] or not registered.equivariant


def test_all_but_the_ablation_declare_themselves_equivariant() -> None:
    assert [name for name in policy.REGISTRY if not policy.REGISTRY.get(name).equivariant] == ["lstm"]


def test_every_policy_declares_a_contraction_that_all_its_plans_keep(registered: Policy) -> None:
    observation = seen(share=0.3)
    declared = registered.alpha_min(observation.shapes)
    assert 0.0 < declared <= 1.0
    for shape, action in zip(observation.shapes, registered.decide(observation), strict=True):
        assert certified(shape, registered.actions.plan(action, LayerPlan())) >= declared


def test_no_policy_meets_a_budget_below_the_smallest_plans(registered: Policy) -> None:
    observation = seen()
    least = int(observation.nbytes.amin(1).sum())
    with pytest.raises(ConfigError, match=f"at least {least} bytes"):
        registered.decide(dataclasses.replace(observation, budget=least - 1))


def test_every_policy_works_inside_mango_and_never_exceeds_the_budget(registered: Policy) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = Mango(model.named_parameters(), lr=1e-2, policy=registered, policy_every=3, memory_budget="1.3 bytes/param")
    count = sum(parameter.numel() for parameter in model.parameters())
    x, y = torch.randn(64, 64), torch.randint(0, 3, (64,))
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.signal(loss=float(loss.detach()), progress=step / 10)
        optimizer.step()
        losses.append(float(loss.detach()))
        assert optimizer.nbytes() <= 1.3 * count
    assert losses[-1] < losses[0]
    assert optimizer.policy is registered


# ---------------------------------------------------------------- actions and the choice within a budget


def test_actions_are_all_combinations_and_name_their_plans() -> None:
    actions = Actions(ranks=(1 / 8, 1 / 2), bits=(16, 4), moments=(8,))
    plans = [actions.plan(action, LayerPlan(scouts=2, error="none")) for action in range(len(actions))]
    assert [(plan.rank, plan.basis_codec, plan.factor_codec, plan.moment_codec) for plan in plans] == [
        (1 / 8, "bf16", None, "int8"),
        (1 / 8, "nf4", "nf4", "int8"),
        (1 / 2, "bf16", None, "int8"),
        (1 / 2, "nf4", "nf4", "int8"),
    ]
    assert {(plan.scouts, plan.error) for plan in plans} == {(2, "none")}
    assert [actions.of(plan) for plan in plans] == [0, 1, 2, 3]


def test_ranks_that_round_to_the_same_columns_are_one_choice() -> None:
    assert [rank for rank, bits, moments in Actions().table if bits == moments == 0] == [0, 1, 2, 3, 4]
    allowed = Actions().allowed((16, 512))  # 16/32 and 16/16 columns are both one
    assert [allowed[place] for place, (_, bits, moments) in enumerate(Actions().table) if bits == moments == 0] == [
        True,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_nearly_the_exact_optimum(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores, observation = torch.rand(12, 45, generator=rng), seen(12, share=random.Random(seed).uniform(0.02, 0.5))
    taken = choose(scores, observation.nbytes, observation.allowed, observation.budget)
    check(taken, observation.nbytes, observation.allowed, observation.budget)
    best = solve(
        [list(zip(w, v, strict=True)) for w, v in zip(observation.nbytes.tolist(), scores.tolist(), strict=True)], observation.budget
    )
    assert best is not None
    worth = [sum(float(scores[layer, action]) for layer, action in enumerate(choice)) for choice in (taken, best)]
    assert worth[1] - 0.25 <= worth[0] <= worth[1] + 1e-6, "within a fraction of one layer's score"


def test_an_action_outside_the_mask_and_a_wrong_count_are_refused() -> None:
    observation = seen(2)
    allowed = observation.allowed.clone()
    allowed[1, 7] = False
    with pytest.raises(ConfigError, match="action of layer 1 = 7 is not legal: one that its mask allows"):
        check([0, 7], observation.nbytes, allowed, None)
    with pytest.raises(ConfigError, match="one for each of 2 layers"):
        check([0], observation.nbytes, allowed, None)
    with pytest.raises(ConfigError, match="at most the budget of 3 bytes"):
        check([0, 0], observation.nbytes, allowed, 3)
    with pytest.raises(ConfigError, match="action = 45"):
        Actions().plan(45, LayerPlan())


@pytest.mark.parametrize(
    ("options", "words"), [({"ranks": ()}, "actions.ranks"), ({"bits": (3,)}, "actions.bits"), ({"moments": ()}, "actions.moments")]
)
def test_actions_are_checked(options: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Actions(**options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- rules


def test_static_keeps_its_plan_and_uniform_takes_the_largest_that_fits() -> None:
    plan = LayerPlan(rank=1 / 4, basis_codec="int8", factor_codec="int8", moment_codec="nf4")
    static = Static(plan)
    assert {static.actions.plan(action, LayerPlan()) for action in static.decide(seen())} == {plan}
    observation = seen(share=0.4)
    chosen = set(Uniform().decide(observation))
    assert len(chosen) == 1
    totals = observation.nbytes.sum(0)
    assert int(totals[chosen.pop()]) == max(int(total) for total in totals if total <= observation.budget)


def test_thresholds_move_the_rank_by_a_rung_and_the_schedule_never_up() -> None:
    actions = Actions()

    def ranks(rule: Policy, energy: float) -> set[float]:
        return {actions.ranks[actions.table[action][0]] for action in rule.decide(seen(energy=energy))}

    assert ranks(Heuristic(), 0.9) == {1 / 16}
    assert ranks(Heuristic(), 0.6) == {1 / 8}
    assert ranks(Heuristic(), 0.2) == {1 / 4}
    assert ranks(RankSchedule(), 0.9) == {1 / 16}
    assert ranks(RankSchedule(), 0.2) == {1 / 8}
    with pytest.raises(ConfigError, match="0 <= low < high <= 1"):
        Heuristic(low=0.8, high=0.5)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("kind", [TinyFormer, LSTMPolicy])
def test_networks_are_small(kind: type[nn.Module]) -> None:
    assert sum(parameter.numel() for parameter in kind().parameters()) < PARAMETERS


def test_tinyformer_is_equivariant_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    net, observation, order = TinyFormer(), seen(9), torch.randperm(9).tolist()
    straight, turned = net.scores(observation), net.scores(observation.permuted(order))
    torch.testing.assert_close(turned, straight[order], atol=1e-5, rtol=1e-4)
    for each in (net, LSTMPolicy()):
        rows = [(seen(count).layers, seen(count).world) for count in (3, 9)]
        both, _ = each(Batch.of(rows))
        alone, _ = each(Batch.of(rows[:1]))
        torch.testing.assert_close(both[0, :3], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow  # a time, which a machine that does other work does not keep
def test_a_decision_about_64_layers_takes_at_most_five_milliseconds() -> None:
    net, observation = policy.REGISTRY.get("tinyformer"), seen(64, share=0.1)
    assert int(observation.nbytes.gather(1, net.scores(observation).argmax(1)[:, None]).sum()) > 0
    took = []
    for _ in range(300):  # two seconds, of which others may slow down some
        begin = time.thread_time()
        net.decide(observation)
        took.append(time.thread_time() - begin)
    assert min(took) <= 0.005


def test_attention_is_a_distribution_over_tokens() -> None:
    found = TinyFormer().attention(seen(4))
    assert found.shape == (6, 5, 5)
    torch.testing.assert_close(found.sum(-1), torch.ones(6, 5))


def test_running_normalisation_is_that_of_all_rows() -> None:
    normaliser, rows = Normaliser(3), torch.randn(50, 3) * torch.tensor([1.0, 5.0, 0.0]) + 2.0
    for part in rows.split([7, 30, 13]):
        normaliser.update(part)
    torch.testing.assert_close(normaliser.mean, rows.mean(0))
    torch.testing.assert_close(normaliser.square, rows.var(0, unbiased=False), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- files


def test_a_policy_survives_its_file_and_the_shipped_one_is_small(tmp_path: Path) -> None:
    net = TinyFormer(actions=Actions())
    store.save(net, tmp_path / "p.safetensors", {"note": "test"})
    back, observation = store.load(tmp_path / "p.safetensors"), seen(6)
    assert torch.equal(net.scores(observation), back.scores(observation))
    assert store.header(tmp_path / "p.safetensors")["recipe"] == {"note": "test"}
    assert (store.SHIPPED / "tinyformer.safetensors").stat().st_size < 1_000_000


def test_files_that_are_not_this_versions_policies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(ConfigError, match="an existing file"):
        store.load(path)
    path.write_bytes(b"nonsense that is longer than a header")
    with pytest.raises(ConfigError, match="a safetensors file"):
        store.load(path)
    monkeypatch.setattr(store, "VERSION", 0)
    store.save(TinyFormer(), path, {})
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"version of .* = 0 is not legal: 1: train it again"):
        store.load(path)


# ---------------------------------------------------------------- inside Mango


def model_and_optimizer(**options: object) -> tuple[nn.Module, Mango]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    return model, Mango(model.named_parameters(), lr=1e-2, **options)  # type: ignore[arg-type]


def push(model: nn.Module, optimizer: Mango, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(torch.randn(32, 64, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


class Alternating(Policy):
    """The smallest plans, then the largest, and so on."""

    count = 0

    def scores(self, seen: Observation) -> torch.Tensor:
        self.count += 1
        return seen.nbytes.double() * (-1.0 if self.count % 2 else 1.0)


def test_decisions_come_when_they_are_due_and_convert_the_state() -> None:
    rule = Alternating()
    model, optimizer = model_and_optimizer(policy=rule, policy_every=4)
    assert rule.count == 1
    push(model, optimizer, 3)
    small = optimizer.nbytes()
    push(model, optimizer, 1, 3)
    assert rule.count == 2
    assert optimizer.nbytes() > small
    push(model, optimizer, 4, 4)
    assert (rule.count, optimizer.nbytes()) == (3, small)


@pytest.mark.parametrize("fused", [False, True])
def test_a_policy_sees_what_the_step_before_its_decision_did(fused: bool) -> None:
    model, optimizer = model_and_optimizer(policy="heuristic", policy_every=3, fuse_backward=fused)
    push(model, optimizer, 3)
    seen_then = optimizer._controller.seen  # type: ignore[union-attr]
    assert bool((seen_then.layer("observed") == 1).all())
    assert bool((seen_then.layer("energy") > 0).all())
    assert bool((seen_then.layer("log_norm") != 0).all())


def test_resuming_under_a_policy_is_exact(tmp_path: Path) -> None:
    whole, optimizer = model_and_optimizer(policy="tinyformer", policy_every=3, memory_budget="1.5 bytes/param")
    push(whole, optimizer, 12)
    first, before = model_and_optimizer(policy="tinyformer", policy_every=3, memory_budget="1.5 bytes/param")
    push(first, before, 5)
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, tmp_path / "c.pt")
    again, after = model_and_optimizer(policy="tinyformer", policy_every=3, memory_budget="1.5 bytes/param")
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    again.load_state_dict(content["model"])
    after.load_state_dict(content["optimizer"])
    push(again, after, 7, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_is_asked_wrongly_is_named() -> None:
    for options, words in [
        ({"policy": "clever"}, "policy = 'clever' is not legal: one of budget"),
        ({"policy": "static", "policy_every": 0}, "policy_every = 0"),
        ({"policy": "static", "plan": None}, "there is no matrix with a plan"),
        ({"policy": "static", "memory_budget": 100}, "memory_budget = 100 is not legal: at least"),
    ]:
        with pytest.raises(ConfigError, match=words):
            model_and_optimizer(**options)
    _, optimizer = model_and_optimizer(policy="static")
    with pytest.raises(ConfigError, match="signal = 'mood' is not legal: one of loss"):
        optimizer.signal(mood=1.0)


# ---------------------------------------------------------------- T7


def test_the_step_condition_is_that_of_the_sequence() -> None:
    shapes, wide, narrow = [(64, 64), (64, 128)], LayerPlan(rank=1 / 2), LayerPlan(rank=1 / 8)
    found = step_condition(0.01, shapes, [(0, [wide, wide]), (6, [wide, narrow])], 10)
    alphas = [certified((64, 64), wide)] * 6 + [certified((64, 128), narrow)] * 4
    assert found.least == min(alphas)
    assert found.step_schedule == rates.schedule(alphas).step(1.0, 1.0)
    assert found.step_declared == rates.ef21(0.01).step(1.0, 1.0) < found.step_schedule


def test_features_are_where_they_are_said_to_be() -> None:
    observation = seen(5)
    assert observation.layers.shape == (5, len(LAYER))
    assert observation.layer("experts").tolist() == [0, 0, 0, 0, 1]
    assert observation.layer("convolution").tolist() == [0, 0, 0, 1, 0]
    assert observation.layer("rank").tolist() == [-3.0] * 5
    assert observation.layer("depth").tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert observation.layer("size").exp().tolist() == pytest.approx([prod(shape) for shape in SHAPES], rel=1e-5)
    assert json.dumps(store.header(store.SHIPPED / "tinyformer.safetensors"))

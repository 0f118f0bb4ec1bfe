"""Experts and their clones: the greedy oracle, traces in files, imitation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_policy_runs import SHORT, tiny_run

from mango import policy
from mango.errors import ConfigError
from mango.policy import imitation
from mango.policy.actions import Actions
from mango.policy.base import LAYER, WORLD
from mango.policy.budget import Budget
from mango.policy.experts import Oracle, follow
from mango.policy.rules import Uniform
from mango.policy.tinyformer import TinyFormer


def test_the_oracle_takes_everything_back_keeps_the_budget_and_changes_nothing_where_plans_tie() -> None:
    run = tiny_run(budget=1.0)
    seen = run.reset()
    run.step(Budget().decide(seen))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    plans, steps = run.optimizer.plans(), run.optimizer._steps()
    choice = Oracle(draws=2, examples=20)(run, run.seen)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert (run.optimizer.plans(), run.optimizer._steps()) == (plans, steps)
    assert sum(int(run.seen.nbytes[place, action]) for place, action in enumerate(choice)) <= (run.seen.budget or 0)
    assert Oracle(draws=2, examples=20, deviations=1e9)(run, run.seen) == list(run.seen.current), "nothing is told apart"


def test_the_oracle_does_not_know_the_batches_that_come() -> None:
    run, tried = tiny_run(budget=1.0), []
    seen, batch = run.reset(), run.data.batch
    run.data = SimpleNamespace(batch=lambda step, size, seed: tried.append(seed) or batch(step, size, seed), evaluation=run.data.evaluation)
    Oracle(draws=3, examples=20)(run, seen)
    assert run.seed not in tried and len(set(tried)) == 3, "each plan on the same other draws"


def test_a_gain_is_known_as_well_as_examples_and_batches_agree_on_it() -> None:
    oracle, generator = Oracle(draws=4, examples=40), torch.Generator().manual_seed(0)
    same = 1.0 + 0.1 * torch.randn(4, 40, generator=generator).double()
    gain, noise = oracle._gain(tiny_run(), same, same - 0.01)
    assert gain == pytest.approx(SHORT.every * math.log(float(same.mean()) / float(same.mean() - 0.01)))
    assert noise == pytest.approx(0.0, abs=1e-9), "on every example of every batch"
    gain, noise = oracle._gain(tiny_run(), same, same - torch.tensor([0.1, 0.0, 0.0, 0.0])[:, None])
    assert gain < oracle.deviations * noise, "on every example, but of one batch alone"


@pytest.mark.parametrize(
    ("name", "words"), [("steps", "= 0 is not legal: an integer >= 1"), ("draws", "= 1 .* >= 2"), ("examples", ">= 2")]
)
def test_an_oracle_that_cannot_tell_chance_apart_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"oracle.{name} .*{words}"):
        Oracle(**{name: 0 if name == "steps" else 1})


# ---------------------------------------------------------------- traces and imitation


@pytest.fixture(scope="module")
def traces() -> list[imitation.Decision]:
    """Of the exact budget and of COMP-AMS, on runs under several budgets."""
    experts = {"budget": Budget(), "uniform": Uniform()}
    return [
        decision
        for name, expert in experts.items()
        for number, budget in enumerate((0.9, 1.1, 1.5, 2.0, 0.9, 1.1, 1.5, 2.0))
        for decision in imitation.record(follow(expert), tiny_run(number, budget), f"{name} digits {budget} {number}")
    ]


def test_traces_survive_their_files(traces: list[imitation.Decision], tmp_path: Path) -> None:
    imitation.save(tmp_path / "t.safetensors", traces, Actions())
    back, actions = imitation.load(tmp_path / "t.safetensors")
    assert actions == Actions()
    for a, b in zip(traces, back, strict=True):
        assert (a.choice, a.budget, a.reward, a.source) == (b.choice, b.budget, b.reward, b.source)
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("layers", "world", "nbytes", "allowed"))


def spoil(content: dict, tensors: dict[str, torch.Tensor], fault: str) -> None:
    match fault:
        case "version":
            content["version"] = 1
        case "features":
            content["layer"] = [*LAYER, "mood"]
        case "a row too few":
            content["decisions"].pop()
        case "outside the mask":
            tensors["allowed"][0, int(tensors["choice"][0])] = False
        case "above the budget":
            content["decisions"][0]["budget"] = 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("version", r"version of .* = 1 is not legal: 2, with this version's features: record them again"),
        ("features", "with this version's features"),
        ("a row too few", "one row a layer and one entry a decision"),
        ("outside the mask", "action of layer 0 = .* one that its mask allows"),
        ("above the budget", "at most the budget of 1 bytes"),
    ],
)
def test_malformed_traces_are_refused_by_what_is_wrong(traces: list[imitation.Decision], tmp_path: Path, fault: str, words: str) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "t.safetensors"
    imitation.save(path, traces[:4], Actions())
    content, tensors = json.loads(path.with_suffix(".json").read_text()), load_file(str(path))
    spoil(content, tensors, fault)
    save_file(tensors, str(path))
    path.with_suffix(".json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=words):
        imitation.load(path)


def test_damaged_or_absent_traces_are_named(traces: list[imitation.Decision], tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(ConfigError, match=r"an existing file that mango\.policy\.imitation\.save wrote"):
        imitation.load(path)
    imitation.save(path, traces[:2], Actions())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="whole safetensors and JSON"):
        imitation.load(path)
    path.write_bytes(whole)
    path.with_suffix(".json").write_text('{"version": 2,')
    with pytest.raises(ConfigError, match="whole safetensors and JSON"):
        imitation.load(path)


@pytest.mark.parametrize("expert", ["budget", "uniform"])
def test_a_clone_agrees_with_its_expert_on_episodes_that_it_has_not_seen(traces: list[imitation.Decision], expert: str) -> None:
    own = [d for d in traces if d.source.startswith(expert)]
    held = [d for d in own if int(d.source.split()[-1]) >= 4]  # other seeds of runs under the same budgets
    shown = [d for d in own if int(d.source.split()[-1]) < 4]
    torch.manual_seed(0)
    learner = TinyFormer(width=32, depth=2, heads=2, hidden=32)
    before = imitation.agreement(learner, held)
    losses = imitation.clone(learner, shown + [imitation.without_signals(d) for d in shown], epochs=60, lr=1e-2)
    assert losses[-1] < losses[0]
    assert imitation.agreement(learner, held) >= 0.9 > before


def test_held_out_traces_are_whole_episodes(traces: list[imitation.Decision]) -> None:
    seen, held = imitation.split(traces, 0.25)
    assert {d.source for d in seen}.isdisjoint(d.source for d in held)
    assert len(seen) + len(held) == len(traces) and len({d.source for d in held}) == 4
    told = imitation.without_signals(replace(traces[0], world=torch.ones(len(WORLD))))
    assert [name for name, value in zip(WORLD, told.world.tolist(), strict=True) if value] == ["has_budget", "used", "budget"]


def test_experts_are_compared_on_the_episodes_that_all_of_them_played() -> None:
    def decision(source: str, reward: float) -> imitation.Decision:
        rows = torch.zeros(1, len(LAYER)), torch.zeros(len(WORLD)), torch.zeros(1, 2).long(), torch.ones(1, 2).bool()
        return imitation.Decision(*rows, None, (0,), reward, source)

    given = [("a t 1.0 0", 1.0), ("a t 1.0 0", 2.0), ("b t 1.0 0", 1.0), ("b t 1.0 0", 0.5), ("a t 1.0 1", -9.0)]
    assert imitation.returns([decision(*each) for each in given]) == ({"a": 3.0, "b": 1.5}, 1)
    with pytest.raises(ConfigError, match="experts that played the same episodes"):
        imitation.returns([decision("a t 1.0 0", 1.0), decision("b t 1.0 1", 1.0)])


def test_the_shipped_policies_agree_with_the_expert_that_they_were_cloned_from() -> None:
    """What imitation reached is in the files' headers; PPO came after it."""
    from mango.policy import store

    for kind in store.KINDS:
        recipe = store.header(store.SHIPPED / f"{kind}.safetensors")["recipe"]
        found = recipe["imitation"]
        experts, best = found["experts"], found["experts"][found["expert"]]
        rules = {name: expert["return"] for name, expert in experts.items() if name != "oracle"}
        oracle = experts["oracle"]["return"] > experts["oracle"]["best_rule"]
        assert found["expert"] == ("oracle" if oracle else max(rules, key=rules.__getitem__)) and found["runs"] >= 16
        assert best["agreement"] >= 0.9 and best["held"] >= 20
        assert kind == "lstm" or all("agreement" in expert for expert in experts.values()), "reported, whatever they are"
        assert {*experts} == {name for name in policy.REGISTRY if name not in store.KINDS} | {"oracle"}
        improved = recipe["improved"]["returns"]
        assert recipe["improved"]["kept"] == max(improved, key=improved.__getitem__)

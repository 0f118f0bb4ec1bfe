"""Policies on short training runs: costs and budgets, episodes in processes, figures of merit."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mango import policy
from mango.errors import ConfigError
from mango.policy import ppo
from mango.policy.actions import Actions
from mango.policy.budget import Budget
from mango.policy.environment import LOSS_CEILING, TRACED, Settings, Task, TrainingRun
from mango.policy.evaluate import bootstrap, hutchpp, hypervolume
from mango.policy.rewards import Costs, Reward, total
from mango.policy.rules import Uniform
from mango.policy.tinyformer import TinyFormer
from mango.policy.workers import Episodes, Workers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow" / "scripts"))
policy_evaluation = importlib.import_module("policy_evaluation")
TASK = Task(
    "digits",
    {"name": "digits", "train": 100, "test": 50, "augment": False},
    {"name": "resnet", "width": 16, "blocks": [1], "stem": "patch4"},
    lr=1e-2,
    batch=16,
)
SHORT = Settings(decisions=2, every=2, evaluate=50, told=0.0)


def tiny_run(number: int = 0, budget: float = 1.5) -> TrainingRun:
    return TrainingRun(TASK, budget, number, SHORT)


# ---------------------------------------------------------------- runs


def test_a_run_is_a_function_of_its_seed_and_its_choices_and_costs_add_up() -> None:
    ends = []
    for _ in range(2):
        run = tiny_run()
        seen, done, rewards = run.reset(), False, []
        while not done:
            seen, reward, done = run.step(Budget().decide(seen))
            rewards.append(reward)
        ends.append((run.loss, run.result().memory, seen.layers))
    assert ends[0][:2] == ends[1][:2] and torch.equal(ends[0][2], ends[1][2])
    assert run.result().loss == pytest.approx(math.log(run.loss / run.first))
    assert sum(rewards) == pytest.approx(SHORT.reward.of(run.result())), "a sum of costs"
    assert run.optimizer.nbytes() <= (run.controller.budget or 0) + run.optimizer.nbytes() - sum(
        int(seen.nbytes[place, action]) for place, action in enumerate(seen.current)
    ), "the layers keep the budget"


def test_a_run_refuses_an_action_above_its_budget() -> None:
    run = tiny_run(budget=0.9)
    seen = run.reset()
    largest = [int(row.argmax()) for row in seen.nbytes.masked_fill(~seen.allowed, 0)]
    with pytest.raises(ConfigError, match="at most the budget"):
        run.step(largest)


def test_a_run_goes_back_to_its_snapshot() -> None:
    run = tiny_run()
    run.reset()
    run.train(2)
    before, loss = run.snapshot(), run.evaluate()
    run.train(2)
    ahead = run.evaluate()
    assert ahead != loss
    run.restore(before)
    assert run.evaluate() == loss
    run.train(2)
    assert run.evaluate() == ahead


def test_losses_are_those_of_each_example_and_divergence_has_a_ceiling() -> None:
    run = tiny_run()
    run.reset()
    assert run.losses(50).shape == (50,)
    assert float(run.losses(50).mean()) == run.evaluate()
    for parameter in run.model.parameters():
        parameter.data.fill_(float("nan"))
    assert run.evaluate() == LOSS_CEILING


# ---------------------------------------------------------------- episodes


def learner() -> TinyFormer:
    torch.manual_seed(0)
    return TinyFormer(width=16, depth=1, heads=2, hidden=16)


class Killed(Exception):
    """Stands in for a kill."""


def test_a_killed_collection_plays_only_what_it_had_not_finished(tmp_path: Path) -> None:
    made: list[int] = []

    def make(number: int) -> TrainingRun:
        if number == 2 and made.count(2) == 0:
            made.append(number)
            raise Killed
        made.append(number)
        return tiny_run(number)

    player = learner()
    with pytest.raises(Killed):
        Episodes(make, folder=tmp_path)(player, range(3))
    found = Episodes(make, folder=tmp_path)(player, range(3))
    assert made == [0, 1, 2, 2], "0 and 1 were kept"
    for kept, fresh in zip(found, Episodes(tiny_run)(player, range(3)), strict=True):
        assert kept.choices == fresh.choices and kept.rewards == pytest.approx(fresh.rewards, abs=0.1), "seconds differ"
    with torch.no_grad():
        player.value.bias += 1.0
    Episodes(make, folder=tmp_path)(player, range(2))
    assert made[4:] == [0, 1], "other weights play anew"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"], "and what is not asked for is dropped"


@pytest.mark.slow  # each process imports torch
def test_processes_play_the_same_episodes(tmp_path: Path) -> None:
    player, episodes = learner(), Episodes(tiny_run, folder=tmp_path)
    with Workers(episodes, 2) as workers:
        found = workers(player, range(4))
    for there, here in zip(found, Episodes(tiny_run)(player, range(4)), strict=True):
        assert there.choices == here.choices
        assert all(torch.equal(a, b) for a, b in zip(there.layers, here.layers, strict=True))
    assert len(list(tmp_path.iterdir())) == 4


def test_the_number_of_processes_is_checked() -> None:
    with pytest.raises(ConfigError, match="workers = 0 is not legal: an integer >= 1"):
        Workers(Episodes(tiny_run), 0)


def test_ppo_improves_on_training_runs_and_resumes_inside_a_collection(tmp_path: Path) -> None:
    def interrupted(stop: int | None, number: int) -> TrainingRun:
        if number == stop:
            raise Killed
        return tiny_run(number)

    def played(where: Path, stop: int | None) -> TinyFormer:
        player = learner()
        trainer = ppo.Trainer(player, ppo.Config(iterations=2, episodes=2))
        ppo.train(trainer, Episodes(partial(interrupted, stop), folder=where / "episodes"), checkpoint=where / "ppo.pt")
        return player

    for where in ("parts", "whole"):
        (tmp_path / where).mkdir()
    with pytest.raises(Killed):
        played(tmp_path / "parts", 3)
    assert sorted(path.name for path in (tmp_path / "parts/episodes").iterdir()) == ["2.pt"]
    again, whole = played(tmp_path / "parts", None), played(tmp_path / "whole", None)
    for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=0.1)  # rewards hold seconds, which are measured


# ---------------------------------------------------------------- rewards


def test_a_reward_is_minus_the_weighted_costs_or_their_largest() -> None:
    costs = Costs(-1.0, 0.4, 0.2)
    assert Reward((1.0, 0.5, 0.1, 9.0)).of(costs) == pytest.approx(1.0 - 0.2 - 0.02), "joules count where they are measured"
    assert Reward((1.0, 0.5, 0.1, 2.0)).of(replace(costs, joules=0.3)) == pytest.approx(1.0 - 0.2 - 0.02 - 0.6)
    chebyshev = Reward((1.0, 0.5, 0.1, 1.0), kind="chebyshev", reference=(-2.0, 0.0, 0.0, 0.0), rho=0.0)
    assert chebyshev.of(costs) == pytest.approx(-1.0)
    parts = [Costs(-0.5, 0.1, 0.2, 1.0), Costs(-0.25, 0.1, 0.3, 2.0)]
    assert asdict(total(parts)) == pytest.approx({"loss": -0.75, "memory": 0.2, "seconds": 0.5, "joules": 3.0})
    assert total([*parts, Costs(0.0, 0.0, 0.0)]).joules is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": (1.0, -0.5, 0.1, 0.1)}, r"reward.weights = \(1.0, -0.5, .* numbers >= 0, not all zero"),
        ({"weights": (0.0, 0.0, 0.0, 0.0)}, "not all zero"),
        ({"weights": (1.0, 1.0)}, "one for each of loss, memory, seconds, joules"),
        ({"kind": "product"}, "reward.kind = 'product' is not legal: one of sum, chebyshev"),
    ],
)
def test_weights_that_are_no_weights_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Reward(**options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- figures of merit


def test_hypervolume_is_the_measure_of_what_is_dominated() -> None:
    """Against counting on a grid on which all points lie, so that the count is exact."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        points = torch.randint(0, 8, (6, 3), generator=generator).double()
        cells = itertools.product(range(8), repeat=3)
        count = sum(bool((points <= torch.tensor(cell).double()).all(1).any()) for cell in cells)
        assert hypervolume(points, torch.full((3,), 8.0).double()) == pytest.approx(count)
    assert hypervolume(torch.tensor([[2.0, 2.0]]), torch.ones(2)) == 0.0
    with pytest.raises(ConfigError, match="one column for each coordinate"):
        hypervolume(torch.zeros(2, 3), torch.ones(2))


def test_the_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = [
        low <= 1.0 <= high
        for low, high in (bootstrap((1.0 + torch.randn(30, generator=generator)).tolist(), draws=300) for _ in range(200))
    ]
    assert 0.88 <= sum(covered) / len(covered) <= 0.98
    assert bootstrap([2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ConfigError, match="at least two"):
        bootstrap([1.0])


def test_hutch_is_exact_for_low_rank_and_unbiased_otherwise() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(40, 2, generator=generator)
    assert hutchpp(lambda x: factor @ (factor.T @ x), 40, 9, generator) == pytest.approx(float(factor.square().sum()), rel=1e-4)
    full = torch.randn(40, 40, generator=generator)
    full = full @ full.T
    found = [hutchpp(lambda x: full @ x, 40, 12, generator) for _ in range(300)]
    assert sum(found) / 300 == pytest.approx(float(full.trace()), rel=0.03)


def test_traces_of_the_hessian_are_those_of_logistic_regression() -> None:
    """Whose Hessian is known: its trace is the mean of |x|^2 times the sum of p (1 - p) over the classes."""
    run = tiny_run()
    run.reset()
    inputs, _ = next(iter(run.data.evaluation("test", TRACED)))
    x = inputs.flatten(1)
    run.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x.shape[1], 10))
    run.controller.shapes = {"1.weight": (10, x.shape[1])}
    p = run.model(inputs).softmax(-1).detach()
    exact = float((x.square().sum(1) * (p * (1 - p)).sum(1)).mean())
    assert run.traces(90) == pytest.approx([exact], rel=0.1)


# ---------------------------------------------------------------- the script


def judged(names: Sequence[str], **changes: object) -> dict:
    return {
        "minutes": 1,
        "seeds": [0],
        "decisions": 2,
        "every": 1,
        "policies": list(names),
        "budgets": [1.0],
        "held_out": {"digits": {"data": TASK.data, "model": TASK.model, "lr": 1e-2, "batch": 16}},
        **changes,
    }


def test_an_evaluation_judges_every_policy_the_oracle_and_each_ablation(tmp_path: Path) -> None:
    from mango.training import config

    ablations = {
        "full-rank": {"policies": ["budget"], "budgets": [2.5], "ranks": [1.0]},
        "error-none": {"policies": ["tinyformer"], "budgets": [1.0], "error": "none"},
    }
    given = config.Policy(**judged(["static", "tinyformer", "lstm"], oracle_seeds=[0], ablations=ablations))
    policy_evaluation.evaluate(given, "smoke", tmp_path / "evaluation.json")
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(run["ablation"], run["policy"]) for run in record["runs"]] == [
        *(("", name) for name in ("static", "tinyformer", "lstm", "oracle")),
        ("full-rank", "budget"),
        ("error-none", "tinyformer"),
    ]
    assert all(run["within"] and 0 < run["bytes"] <= run["limit"] for run in record["runs"]), "no policy ever exceeds its budget"
    for run in record["runs"]:
        assert run["reward"] == pytest.approx(Reward().of(Costs(**{key: run[key] for key in ("loss", "memory", "seconds", "joules")})))
        assert 0 < run["condition"]["alpha_min"] <= run["condition"]["least"]
        assert run["condition"]["step_declared"] <= run["condition"]["step_schedule"]
    full = record["runs"][4]
    assert full["condition"]["least"] > record["runs"][0]["condition"]["least"], "nothing is cut off"
    assert full["as_budget"] == 1.0
    assert [len(decision["attention"]) for decision in record["decisions"]] == [1 + len(record["decisions"][0]["layers"])] * 2


def test_a_stopped_evaluation_goes_on_and_judges_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mango.training import config

    given, judge, done = config.Policy(**judged(["static", "uniform"], seeds=[0, 1])), policy_evaluation.judge, []

    def stopping(compared, name: str, run: TrainingRun, *rest: object) -> dict:
        if len(done) == 3:
            done.append("stop")
            raise Killed
        done.append(f"{name} {run.seed}")
        return judge(compared, name, run, *rest)

    monkeypatch.setattr(policy_evaluation, "judge", stopping)
    with pytest.raises(Killed):
        policy_evaluation.evaluate(given, "smoke", tmp_path / "evaluation.json")
    part = tmp_path / "evaluation.part.jsonl"
    part.write_text(part.read_text() + '{"half a li')
    policy_evaluation.evaluate(given, "smoke", tmp_path / "evaluation.json")
    assert done == ["static 0", "uniform 0", "static 1", "stop", "uniform 1"]
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(run["policy"], run["seed"]) for run in record["runs"]] == [("static", 0), ("uniform", 0), ("static", 1), ("uniform", 1)]
    assert not part.exists()


def test_a_learned_policy_is_not_judged_on_other_actions_than_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policies: tinyformer = \(1.0,\) is not legal: only \(0.03125"):
        policy_evaluation.policy_of("tinyformer", Actions(ranks=(1.0,)), tmp_path)
    with pytest.raises(ConfigError, match="an existing file"):
        policy_evaluation.policy_of("scratch", Actions(), tmp_path)
    assert isinstance(policy_evaluation.policy_of("uniform", Actions(ranks=(1.0,)), tmp_path), Uniform)
    assert set(policy.REGISTRY) >= {"tinyformer", "lstm"}


def test_training_needs_tasks() -> None:
    from mango.training import config

    with pytest.raises(ConfigError, match=r"policy.train = \[\] is not legal: at least one task"):
        importlib.import_module("policy").environment(config.Policy(**judged(["static"])), 0)

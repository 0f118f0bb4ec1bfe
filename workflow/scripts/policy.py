"""What the policy rules do: record experts, clone them, improve by PPO, and judge every policy on held-out tasks.

python workflow/scripts/policy.py traces   --config FILE --out traces.safetensors
python workflow/scripts/policy.py imitate  --config FILE --traces traces.safetensors --kind tinyformer --out cloned.safetensors
python workflow/scripts/policy.py ppo      --config FILE [--start cloned.safetensors] --kind tinyformer --out trained.safetensors
python workflow/scripts/policy.py evaluate --config FILE --out evaluation.json

Evaluation finds learned policies that are not registered (cloned-tinyformer, cloned-lstm, scratch) beside its output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from policy_evaluation import evaluate, settings_of, task_of
from tqdm import tqdm

from mango import policy as policies
from mango.errors import ConfigError, MangoError
from mango.policy import imitation, ppo, store
from mango.policy.actions import Actions
from mango.policy.environment import TrainingRun
from mango.policy.experts import Expert, Oracle, follow
from mango.policy.workers import Episodes, Workers
from mango.training import config

HELD = 0.2  # share of the episodes of traces that imitation does not see
# Added to a training run's number for its seed where experts are recorded and policies compared: PPO plays other seeds.
RECORDED = 1_000_000
RULES = [name for name in policies.REGISTRY if name not in store.KINDS]
ORACLE = "oracle"


def environment(given: config.Policy, number: int, seed: int | None = None) -> TrainingRun:
    """The training run of this number: each task under each budget in turn."""
    tasks = list(given.train)
    if not tasks or not given.train_budgets:
        raise ConfigError.of("policy.train", tasks, "at least one task, and one of policy.train_budgets, to train policies on")
    task, budget = tasks[number % len(tasks)], given.train_budgets[number // len(tasks) % len(given.train_budgets)]
    return TrainingRun(task_of(task, given.train[task]), budget, number if seed is None else seed, settings_of(given))


def episode(given: config.Policy, name: str, expert: Expert, number: int) -> list[imitation.Decision]:
    """What an expert does on the training run of this number."""
    run = environment(given, number, RECORDED + number)
    return imitation.record(expert, run, f"{name} {run.task.name} {run.budget} {number}")


def make_traces(given: config.Policy, out: Path) -> None:
    """Every rule is an expert, and so is the greedy oracle. They take turns, so that a machine that slows down does so for all of them."""
    experts = {name: follow(policies.REGISTRY.get(name)) for name in RULES}
    decisions = []
    for number in tqdm(range(max(given.traces, given.oracle_traces))):
        for name, expert in (experts if number < given.traces else {}).items():
            decisions += episode(given, name, expert, number)
        if number < given.oracle_traces:
            decisions += episode(given, ORACLE, Oracle(), number)
    imitation.save(out, decisions, Actions())


def elect(decisions: list[imitation.Decision]) -> dict[str, Any]:
    """The expert that earned most: the best rule of all runs, unless the oracle beats it on the few that it was recorded on."""
    of = {name: [d for d in decisions if d.source.startswith(f"{name} ")] for name in (*RULES, ORACLE)}
    earned, runs = imitation.returns([d for name in RULES for d in of[name]])
    best = max(earned, key=earned.__getitem__)
    found: dict[str, Any] = {"expert": best, "runs": runs, "experts": {name: {"return": value} for name, value in earned.items()}}
    if of[ORACLE]:
        pair, few = imitation.returns(of[best] + of[ORACLE])
        found["experts"][ORACLE] = {"return": pair[ORACLE], "runs": few, "best_rule": pair[best]}
        found["expert"] = max(pair, key=pair.__getitem__)
    return found


def imitate(given: config.Policy, traces: Path, kind: str, out: Path) -> None:
    """Clones the expert that earned most; TinyFormer's agreement with every other one is that of a clone of its own."""
    decisions, _ = imitation.load(traces)
    report = elect(decisions)
    best, experts = report["expert"], report["experts"]
    for expert in experts if kind == "tinyformer" else [best]:
        own = [d for d in decisions if d.source.startswith(f"{expert} ")]
        seen, held = imitation.split(own, HELD)
        torch.manual_seed(0)
        learner = store.KINDS[kind]()
        losses = imitation.clone(learner, seen + [imitation.without_signals(d) for d in seen], given.epochs)
        agreement = imitation.agreement(learner, held)
        experts[expert] |= {"loss": losses[-1], "agreement": agreement, "seen": len(seen), "held": len(held)}
        print(expert, experts[expert], flush=True)
        if expert == best:
            chosen = learner
    store.save(chosen, out, {"imitation": report, "settings": given.model_dump(mode="json")})
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


def improve(given: config.Policy, start: Path | None, kind: str, out: Path) -> None:
    """PPO; what it made of a clone is kept if it earns more than the clone on the runs that experts were recorded on."""
    torch.manual_seed(0)
    learner = store.KINDS[kind]() if start is None else store.load(start)
    if not isinstance(learner, store.KINDS[kind]):
        raise ConfigError.of("--start", str(start), f"a policy of kind {kind}")
    curve: list[dict[str, float]] = []
    log = out.with_suffix(".jsonl")

    def report(done: int, found: dict[str, float]) -> None:
        curve.append({"iteration": done} | found)
        with log.open("a") as file:
            file.write(json.dumps(curve[-1]) + "\n")
        print(" ".join(f"{key} {value:.3f}" for key, value in curve[-1].items()), flush=True)

    settings = ppo.Config(iterations=given.iterations, episodes=given.episodes, lr=3e-4)
    checkpoint, folder = out.with_suffix(".pt"), out.with_suffix(".episodes")
    episodes = Episodes(partial(environment, given), folder=folder)
    with Workers(episodes, given.workers) if given.workers > 1 else nullcontext(episodes) as collect:
        ppo.train(ppo.Trainer(learner, settings), collect, report, checkpoint)
    recipe: dict[str, Any] = {"ppo": asdict(settings), "settings": given.model_dump(mode="json")}
    if start is not None:
        rivals = {"clone": store.load(start), "ppo": learner}
        played = [d for number in range(given.traces) for name, each in rivals.items() for d in episode(given, name, follow(each), number)]
        earned, runs = imitation.returns(played)
        kept = max(earned, key=earned.__getitem__)
        learner = rivals[kept]
        recipe |= {"imitation": store.header(start)["recipe"]["imitation"], "improved": {"kept": kept, "runs": runs, "returns": earned}}
        print(recipe["improved"], flush=True)
    store.save(learner, out, recipe)
    checkpoint.unlink()
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["traces", "imitate", "ppo", "evaluate"])
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--kind", default="tinyformer", choices=list(store.KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        tier = config.load(options.config)
        if tier.policy is None:
            raise ConfigError.of("policy", None, f"a section of {options.config}")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        match options.action:
            case "traces":
                make_traces(tier.policy, options.out)
            case "imitate":
                imitate(tier.policy, options.traces, options.kind, options.out)
            case "ppo":
                improve(tier.policy, options.start, options.kind, options.out)
            case "evaluate":
                evaluate(tier.policy, tier.tier, options.out)
    except MangoError as error:
        sys.exit(f"policy: error: {error}")


if __name__ == "__main__":
    main()

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
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from policy_evaluation import evaluate, settings_of, task_of
from tqdm import tqdm

from mango.errors import ConfigError, MangoError
from mango.policy import imitation, ppo, store
from mango.policy.budget import Budget
from mango.policy.environment import TrainingRun
from mango.policy.experts import Expert, Oracle, follow
from mango.policy.rules import Uniform
from mango.policy.workers import Episodes, Workers
from mango.training import config

HELD = 0.2  # share of the episodes of traces that imitation does not see
EXPERTS: dict[str, Callable[[], Expert]] = {
    "compams": lambda: follow(Uniform()),
    "budget": lambda: follow(Budget()),
    "oracle": Oracle,
}


def environment(given: config.Policy, number: int, seed: int | None = None) -> TrainingRun:
    """The training run of this number: each task under each budget in turn."""
    tasks = list(given.train)
    if not tasks or not given.train_budgets:
        raise ConfigError.of("policy.train", tasks, "at least one task, and one of policy.train_budgets, to train policies on")
    task, budget = tasks[number % len(tasks)], given.train_budgets[number // len(tasks) % len(given.train_budgets)]
    return TrainingRun(task_of(task, given.train[task]), budget, number if seed is None else seed, settings_of(given))


def make_traces(given: config.Policy, out: Path) -> None:
    decisions = []
    for name, expert in EXPERTS.items():
        for number in tqdm(range(given.oracle_traces if name == "oracle" else given.traces), desc=name):
            run = environment(given, number, seed=1000 + number)
            decisions += imitation.record(expert(), run, f"{name} {run.task.name} {run.budget} {number}")
    imitation.save(out, decisions, run.actions)


def imitate(given: config.Policy, traces: Path, kind: str, out: Path) -> None:
    """Clones the exact budget; TinyFormer's agreement with each expert on held-out episodes is that of a clone of its own."""
    decisions, _ = imitation.load(traces)
    report: dict[str, Any] = {"decisions": imitation.describe(decisions)}
    shipped = None
    for expert in EXPERTS if kind == "tinyformer" else ["budget"]:
        own = [d for d in decisions if d.source.startswith(f"{expert} ")]
        seen, held = imitation.split(own, HELD)
        torch.manual_seed(0)
        learner = store.KINDS[kind]()
        seen = seen + [imitation.without_signals(d) for d in seen]
        losses = imitation.clone(learner, seen, given.epochs)
        report[expert] = {"loss": losses[-1], "agreement": imitation.agreement(learner, held), "held": len(held)}
        print(expert, report[expert], flush=True)
        if expert == "budget":
            shipped = learner
    assert shipped is not None
    store.save(shipped, out, {"imitation": report, "settings": given.model_dump(mode="json")})
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


def improve(given: config.Policy, start: Path | None, kind: str, out: Path) -> None:
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
    checkpoint, played = out.with_suffix(".pt"), out.with_suffix(".episodes")
    episodes = Episodes(partial(environment, given), folder=played)
    with Workers(episodes, given.workers) if given.workers > 1 else nullcontext(episodes) as collect:
        ppo.train(ppo.Trainer(learner, settings), collect, report, checkpoint)
    recipe: dict[str, Any] = {
        "start": "imitation" if start else "random",
        "ppo": asdict(settings),
        "settings": given.model_dump(mode="json"),
    }
    if start is not None:
        recipe["imitation"] = store.header(start)["recipe"]["imitation"]
    store.save(learner, out, recipe)
    checkpoint.unlink()
    shutil.rmtree(played)


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

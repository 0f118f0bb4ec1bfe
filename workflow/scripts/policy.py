"""What the policy rules do: record experts, clone them, improve by PPO, and judge every policy on held-out tasks.

python workflow/scripts/policy.py traces   --config FILE --out traces.safetensors
python workflow/scripts/policy.py imitate  --config FILE --traces traces.safetensors --kind tinyformer --out cloned.safetensors
python workflow/scripts/policy.py ppo      --config FILE [--start cloned.safetensors] --kind tinyformer --out trained.safetensors
python workflow/scripts/policy.py evaluate --config FILE --out evaluation.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mango import policy as policies
from mango.errors import ConfigError, MangoError
from mango.policy import imitation, ppo, store
from mango.policy.base import step_condition
from mango.policy.budget import Budget
from mango.policy.environment import Settings, Task, TrainingRun
from mango.policy.experts import Expert, Oracle, follow
from mango.policy.rewards import Reward
from mango.policy.rules import Uniform
from mango.telemetry import PowerSampler
from mango.training import atomic, provenance
from mango.training.config import Policy, PolicyTask, load

HELD = 0.2  # share of the episodes of traces that imitation does not see
SLOWER = 16  # an episode of the oracle takes so many times as long as another, and there are so many times fewer
EXPERTS: dict[str, Callable[[], Expert]] = {
    "compams": lambda: follow(Uniform()),
    "budget": lambda: follow(Budget()),
    "oracle": Oracle,
}


def task_of(name: str, given: PolicyTask) -> Task:
    data = {**given.data.arguments()}
    return Task(name, data, given.model.model_dump(), given.lr, given.batch, tuple(given.exclude))


def settings_of(given: Policy) -> Settings:
    return Settings(decisions=given.decisions, every=given.every, reward=Reward(tuple(given.weights)))


def make_traces(given: Policy, out: Path) -> None:
    tasks = [task_of(name, task) for name, task in given.train.items()]
    settings, decisions = settings_of(given), []
    for name, expert in EXPERTS.items():
        episodes = max(2, given.traces // SLOWER) if name == "oracle" else given.traces
        for number in tqdm(range(episodes), desc=name):
            task, budget = tasks[number % len(tasks)], given.train_budgets[number // len(tasks) % len(given.train_budgets)]
            run = TrainingRun(task, budget, 1000 + number, settings)
            decisions += imitation.record(expert(), run, f"{name} {task.name} {budget} {number}")
    imitation.save(out, decisions, run.actions)


def imitate(given: Policy, traces: Path, kind: str, out: Path) -> None:
    """Clones the exact budget; agreement with each expert on held-out episodes is reported for a clone of its own."""
    decisions, _ = imitation.load(traces)
    report: dict[str, Any] = {"decisions": imitation.describe(decisions)}
    shipped = None
    for expert in EXPERTS:
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


def improve(given: Policy, start: Path | None, kind: str, out: Path) -> None:
    torch.manual_seed(0)
    learner = store.KINDS[kind]() if start is None else store.load(start)
    if not isinstance(learner, store.KINDS[kind]):
        raise ConfigError.of("--start", str(start), f"a policy of kind {kind}")
    tasks, settings = [task_of(name, task) for name, task in given.train.items()], settings_of(given)

    def make(number: int) -> TrainingRun:
        return TrainingRun(
            tasks[number % len(tasks)], given.train_budgets[number // len(tasks) % len(given.train_budgets)], number, settings
        )

    curve: list[dict[str, float]] = []
    log = out.with_suffix(".jsonl")

    def report(done: int, found: dict[str, float]) -> None:
        curve.append({"iteration": done} | found)
        with log.open("a") as file:
            file.write(json.dumps(curve[-1]) + "\n")
        print(" ".join(f"{key} {value:.3f}" for key, value in curve[-1].items()), flush=True)

    config = ppo.Config(iterations=given.iterations, episodes=given.episodes, lr=3e-4)
    checkpoint = out.with_suffix(".pt")
    ppo.train(ppo.Trainer(learner, config), ppo.in_process(make), report, checkpoint)
    recipe: dict[str, Any] = {"start": "imitation" if start else "random", "ppo": asdict(config), "settings": given.model_dump(mode="json")}
    if start is not None:
        recipe["imitation"] = store.header(start)["recipe"]["imitation"]
    store.save(learner, out, recipe)
    checkpoint.unlink()


def expert_of(name: str) -> tuple[Expert, Any]:
    if name == "oracle":
        return Oracle(), None
    policy = policies.REGISTRY.get(name) if name in policies.REGISTRY else store.load(Path(name))
    return follow(policy), policy


def evaluate(given: Policy, tier: str, out: Path) -> None:
    """Every policy on every held-out task, budget and seed; costs of whole runs, T7's condition, and what the learned policy did."""
    settings, rows, trace = settings_of(given), [], []
    begin = time.monotonic()
    with PowerSampler(source="auto") as power:
        measured = power if power.source is not None else None
        names = [(n, t, b, s) for s in given.seeds for t in given.held_out for b in given.budgets for n in given.policies]
        for name, task, budget, seed in tqdm(names):
            expert, policy = expert_of(name)
            run = TrainingRun(task_of(task, given.held_out[task]), budget, seed, settings, power=measured)
            seen, done, total, largest = run.reset(), False, 0.0, 0
            while not done:
                choice = expert(run, seen)
                largest = max(largest, sum(int(seen.nbytes[place, action]) for place, action in enumerate(choice)))
                if name == "tinyformer" and seed == given.seeds[0]:
                    trace.append(described(run, seen, choice, policy, task, budget))
                seen, reward, done = run.step(choice)
                total += reward
            shapes, bases = list(run.controller.shapes.values()), list(run.controller.layers.values())
            declared = min(run.actions.alpha_min(shape, base) for shape, base in zip(shapes, bases, strict=True))
            condition = step_condition(declared, shapes, run.history, settings.decisions * settings.every)
            limit = run.controller.budget
            rows.append(
                {"policy": name, "task": task, "budget": budget, "seed": seed, "reward": total, "final_loss": run.loss}
                | asdict(run.result())
                | {"bytes": largest, "limit": limit, "within": limit is None or largest <= limit, "condition": asdict(condition)}
            )
        reason = power.reason
    content = {
        "tier": tier,
        "settings": given.model_dump(mode="json"),
        "runs": rows,
        "decisions": trace,
        "imitation": store.header(store.SHIPPED / "tinyformer.safetensors")["recipe"].get("imitation"),
        "recipe": store.header(store.SHIPPED / "tinyformer.safetensors")["recipe"],
        "energy": {"source": None if measured is None else measured.source, "reason": reason},
        "seconds": time.monotonic() - begin,
        "git": provenance.git(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(torch.device("cpu")),
    }
    atomic.write(out, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def described(run: TrainingRun, seen: Any, choice: list[int], policy: Any, task: str, budget: float) -> dict[str, Any]:
    """One decision of the learned policy: what it chose against the curvature, how sure it was, and what the run's token looked at."""
    scores = policy.scores(seen).masked_fill(~seen.allowed, float("-inf")).log_softmax(-1)
    entropy = -(scores.exp() * scores.masked_fill(~seen.allowed, 0.0)).sum(-1)
    return {
        "task": task,
        "budget": budget,
        "decision": run.decisions,
        "layers": list(seen.names),
        "rank": [run.actions.ranks[run.actions.table[action][0]] for action in choice],
        "bits": [run.actions.bits[run.actions.table[action][1]] for action in choice],
        "moments": [run.actions.moments[run.actions.table[action][2]] for action in choice],
        "entropy": entropy.tolist(),
        "attention": policy.attention(seen)[-1][0].tolist(),
        "trace": run.traces(),
    }


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
        tier = load(options.config)
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

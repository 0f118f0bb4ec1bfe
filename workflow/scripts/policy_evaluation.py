"""Judging policies on held-out tasks: every policy on every task, budget and seed, the greedy oracle, and ablations.

Runs that are done are kept beside the output until all are, so that an evaluation that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import codehash
import torch
from tqdm import tqdm

from mango import policy as policies
from mango.errors import ConfigError
from mango.policy import store
from mango.policy.actions import Actions
from mango.policy.base import Observation, Policy, step_condition
from mango.policy.budget import Budget
from mango.policy.environment import Settings, Task, TrainingRun
from mango.policy.experts import Oracle, follow
from mango.policy.rewards import Reward
from mango.policy.tinyformer import LearnedPolicy
from mango.policy.workers import weights_hash
from mango.telemetry import PowerSampler
from mango.training import atomic, config, provenance


def task_of(name: str, given: config.PolicyTask) -> Task:
    data = {**given.data.arguments()}
    return Task(name, data, given.model.model_dump(), given.lr, given.batch, tuple(given.exclude))


def settings_of(given: config.Policy) -> Settings:
    return Settings(decisions=given.decisions, every=given.every, reward=Reward(tuple(given.weights)))


@dataclass(frozen=True)
class Comparison:
    """Policies that are judged together, as the experiment says or with one thing changed."""

    ablation: str
    policies: list[str]
    seeds: list[int]
    budgets: list[float]
    settings: Settings
    actions: Actions


def comparisons(given: config.Policy) -> Iterator[Comparison]:
    settings = settings_of(given)
    yield Comparison("", given.policies, given.seeds, given.budgets, settings, Actions())
    yield Comparison("", ["oracle"], given.oracle_seeds, given.budgets, settings, Actions())
    for name, changed in given.ablations.items():
        actions = Actions() if changed.ranks is None else Actions(ranks=tuple(changed.ranks))
        seeds = given.seeds if changed.seeds is None else changed.seeds
        yield Comparison(name, changed.policies, seeds, changed.budgets, replace(settings, error=changed.error), actions)


def policy_of(name: str, actions: Actions, folder: Path) -> Policy:
    """A rule over these actions, or a learned policy, whose actions are its own. Raises: ConfigError."""
    if name in policies.REGISTRY and name not in store.KINDS:
        return policies.REGISTRY.get(name, actions=actions)
    learned = policies.REGISTRY.get(name) if name in store.KINDS else store.load(folder / f"{name}.safetensors")
    if learned.actions != actions:
        raise ConfigError.of(
            f"policy.ablations.*.policies: {name}", actions.ranks, f"only {learned.actions.ranks}, which it was trained on"
        )
    return learned


def judge(compared: Comparison, name: str, run: TrainingRun, policy: Policy | None, trace: list[dict[str, Any]] | None) -> dict[str, Any]:
    """One run under a policy, or under the oracle: its costs, its bytes, T7's condition and how often it agrees with the exact budget.

    ``trace`` takes a description of each decision, where it is wanted.
    """
    expert, exact = Oracle() if policy is None else follow(policy), Budget(actions=compared.actions)
    declaring = exact if policy is None else policy
    seen, done, total, largest, same = run.reset(), False, 0.0, 0, []
    while not done:
        choice = expert(run, seen)
        same += [a == b for a, b in zip(choice, exact.decide(seen), strict=True)]
        largest = max(largest, sum(int(seen.nbytes[place, action]) for place, action in enumerate(choice)))
        if trace is not None:
            trace.append(described(run, seen, choice, policy))
        seen, reward, done = run.step(choice)
        total += reward
    shapes, bases = list(run.controller.shapes.values()), list(run.controller.layers.values())
    declared = min(declaring.alpha_min([shape], base) for shape, base in zip(shapes, bases, strict=True))
    condition = step_condition(declared, shapes, run.history, run.settings.decisions * run.settings.every)
    limit = run.controller.budget
    return (
        {"ablation": compared.ablation, "policy": name, "task": run.task.name, "budget": run.budget, "seed": run.seed}
        | {"reward": total, "final_loss": run.loss, "as_budget": sum(same) / len(same)}
        | asdict(run.result())
        | {"bytes": largest, "limit": limit, "within": limit is None or largest <= limit, "condition": asdict(condition)}
    )


def evaluate(given: config.Policy, tier: str, out: Path) -> None:
    """Every policy on every held-out task, budget and seed; costs of whole runs, T7's condition, and what the learned policy did."""
    kept = Kept(out.with_suffix(".part.jsonl"))
    rows: list[dict[str, Any]] = []
    with PowerSampler(source="auto") as power:
        measured = power if power.source is not None else None
        jobs = [
            (compared, *rest)
            for compared in comparisons(given)
            for rest in product(compared.seeds, given.held_out, compared.budgets, compared.policies)
        ]
        for compared, seed, task, budget, name in tqdm(jobs):
            policy = None if name == "oracle" else policy_of(name, compared.actions, out.parent)
            run = TrainingRun(task_of(task, given.held_out[task]), budget, seed, compared.settings, compared.actions, measured)
            watched = name == "tinyformer" and not compared.ablation and seed == given.seeds[0]
            key = identity(run, name, policy, watched)
            if key not in kept.found:
                trace: list[dict[str, Any]] = []
                start = time.monotonic()
                row = judge(compared, name, run, policy, trace if watched else None)
                kept.add(key, {"run": row, "decisions": trace, "data": run.data.identity(), "seconds": time.monotonic() - start})
            rows.append(kept.found[key])
        reason = power.reason
    content = {
        "tier": tier,
        "settings": given.model_dump(mode="json"),
        "data": {row["run"]["task"]: row["data"] for row in rows},
        "runs": [row["run"] for row in rows],
        "decisions": [decision for row in rows for decision in row["decisions"]],
        "recipes": {name: store.header(store.SHIPPED / f"{name}.safetensors")["recipe"] for name in store.KINDS},
        "energy": {"source": None if measured is None else measured.source, "reason": reason},
        "seconds": sum(row["seconds"] for row in rows),
        "git": provenance.git(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(torch.device("cpu")),
    }
    atomic.write(out, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))
    kept.path.unlink(missing_ok=True)


class Kept:
    """Results by key in a file of lines; a last line that is not whole is one that was not finished."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[str, Any]()
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                self.found |= json.loads(line)
            except json.JSONDecodeError:
                continue

    def add(self, key: str, content: dict[str, Any]) -> None:
        self.found[key] = content
        with self.path.open("a") as file:
            file.write(json.dumps({key: content}) + "\n")


@cache
def code() -> str:
    return codehash.digest(["workflow/scripts/policy_evaluation.py"])


def identity(run: TrainingRun, name: str, policy: Policy | None, watched: bool) -> str:
    """Changes when anything that the result is a function of changes, code included."""
    weights = weights_hash(policy) if isinstance(policy, LearnedPolicy) else ""
    said = (code(), asdict(run.task), run.budget, run.seed, asdict(run.settings), asdict(run.actions), name, weights, watched)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def described(run: TrainingRun, seen: Observation, choice: list[int], policy: Any) -> dict[str, Any]:
    """One decision of the learned policy: what it chose against the curvature, how sure it was, who looked at whom in the last block."""
    scores = policy.scores(seen).masked_fill(~seen.allowed, float("-inf")).log_softmax(-1)
    entropy = -(scores.exp() * scores.masked_fill(~seen.allowed, 0.0)).sum(-1)
    return {
        "task": run.task.name,
        "budget": run.budget,
        "decision": run.decisions,
        "layers": list(seen.names),
        "rank": [run.actions.ranks[run.actions.table[action][0]] for action in choice],
        "bits": [run.actions.bits[run.actions.table[action][1]] for action in choice],
        "moments": [run.actions.moments[run.actions.table[action][2]] for action in choice],
        "entropy": entropy.tolist(),
        "attention": policy.attention(seen)[-1].tolist(),
        "trace": run.traces(),
    }

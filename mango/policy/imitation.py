"""Imitation: traces of experts' decisions as safetensors and JSON, and the cross-entropy that clones them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mango.compat import require
from mango.errors import ConfigError
from mango.optim.plan import LayerPlan
from mango.policy.actions import Actions, check
from mango.policy.base import LAYER, WORLD, Observation
from mango.policy.environment import TrainingRun
from mango.policy.tinyformer import Batch, LearnedPolicy

VERSION = 2  # 1 had no rewards


@dataclass(frozen=True)
class Decision:
    """What an expert saw, chose and earned. Names, shapes and plans of the layers are not kept: a learned policy does not see them."""

    layers: Tensor  # (n, features)
    world: Tensor
    nbytes: Tensor  # (n, A)
    allowed: Tensor  # (n, A) bool
    budget: int | None
    choice: tuple[int, ...]
    reward: float  # of the steps that followed
    source: str  # expert, task, budget and number: decisions of one episode have the same

    def observation(self) -> Observation:
        """As a learned policy takes it."""
        count = len(self.layers)
        names = tuple(str(place) for place in range(count))
        plans = (LayerPlan(),) * count
        return Observation(names, ((),) * count, self.layers, self.world, plans, (0,) * count, self.nbytes, self.allowed, self.budget)


def record(expert: Callable[[TrainingRun, Observation], list[int]], run: TrainingRun, source: str) -> list[Decision]:
    """The decisions of one episode under an expert."""
    found, done, seen = [], False, run.reset()
    while not done:
        choice = expert(run, seen)
        after, reward, done = run.step(choice)
        found.append(Decision(seen.layers, seen.world, seen.nbytes, seen.allowed, seen.budget, tuple(choice), reward, source))
        seen = after
    return found


def save(path: Path, decisions: Sequence[Decision], actions: Actions) -> None:
    """Write ``path`` (safetensors: rows of all decisions one after the other) and, beside it, the same name in .json (everything else)."""
    library = require("safetensors.torch", extra="experiments", purpose="saving traces")
    tensors = {name: torch.cat([getattr(d, name) for d in decisions]).contiguous() for name in ("layers", "nbytes", "allowed")}
    tensors |= {
        "world": torch.stack([d.world for d in decisions]),
        "choice": torch.tensor([action for d in decisions for action in d.choice]),
        "count": torch.tensor([len(d.choice) for d in decisions]),
    }
    library.save_file(tensors, str(path))
    content = {
        "version": VERSION,
        "layer": LAYER,
        "world": WORLD,
        "actions": asdict(actions),
        "decisions": [{"source": d.source, "budget": d.budget, "reward": d.reward} for d in decisions],
    }
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> tuple[list[Decision], Actions]:
    """Read traces. Raises: ConfigError when they are absent, damaged, of another version, or hold a decision that is not legal."""
    library = require("safetensors", extra="experiments", purpose="loading traces")
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not file.is_file():
            raise ConfigError.of("traces", str(file), "an existing file that mango.policy.imitation.save wrote")
    try:
        content = json.loads(beside.read_text())
        with library.safe_open(str(path), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in ("layers", "nbytes", "allowed", "world", "choice", "count")}
    except (json.JSONDecodeError, library.SafetensorError) as error:
        raise ConfigError.of("traces", str(path), f"whole safetensors and JSON ({error})") from None
    if content.get("version") != VERSION or content.get("layer") != list(LAYER) or content.get("world") != list(WORLD):
        legal = f"{VERSION}, with this version's features: record them again with the workflow's rule policy_traces"
        raise ConfigError.of(f"version of {path}", content.get("version"), legal)
    counts = tensors["count"].tolist()
    if len(content["decisions"]) != len(counts) or sum(counts) != len(tensors["choice"]) or len(tensors["layers"]) != sum(counts):
        raise ConfigError.of("traces", str(path), f"one row a layer and one entry a decision: {beside.name} and the tensors disagree")
    actions = Actions(**{name: tuple(value) for name, value in content["actions"].items()})
    decisions = []
    rows = zip(*(tensors[name].split(counts) for name in ("layers", "nbytes", "allowed", "choice")), tensors["world"], strict=True)
    for (layers, nbytes, allowed, choice, world), entry in zip(rows, content["decisions"], strict=True):
        check(choice.tolist(), nbytes, allowed, entry["budget"])
        decisions.append(
            Decision(layers, world, nbytes, allowed, entry["budget"], tuple(choice.tolist()), entry["reward"], entry["source"])
        )
    return decisions, actions


def split(decisions: Sequence[Decision], share: float, seed: int = 0) -> tuple[list[Decision], list[Decision]]:
    """(training, held out), by whole episodes."""
    sources = sorted({d.source for d in decisions})
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {sources[place] for place in order[: max(1, int(share * len(sources)))]}
    return [d for d in decisions if d.source not in held], [d for d in decisions if d.source in held]


def clone(
    policy: LearnedPolicy, decisions: Sequence[Decision], epochs: int, lr: float = 1e-3, batch: int = 64, seed: int = 0
) -> list[float]:
    """Train the policy to choose as the decisions do: cross-entropy under the mask and, at random, with or without what can be not told.

    Returns: the mean loss of each epoch.
    """
    if not decisions:
        raise ConfigError.of("decisions", 0, "at least one")
    generator = torch.Generator().manual_seed(seed)
    whole = Batch.of([(d.layers, d.world) for d in decisions])
    policy.learn_scales(whole)
    most = whole.present.shape[1]
    masks = torch.stack([torch.nn.functional.pad(d.allowed, (0, 0, 0, most - len(d.allowed)), value=True) for d in decisions])
    choices = torch.tensor([[*d.choice, *[0] * (most - len(d.choice))] for d in decisions])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=1e-2)
    steps = epochs * -(-len(decisions) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses = []
    for _ in range(epochs):
        found = []
        for rows in torch.randperm(len(decisions), generator=generator).split(batch):
            scores, _ = policy(Batch(whole.layers[rows], whole.world[rows], whole.present[rows]))
            logs = scores.masked_fill(~masks[rows], float("-inf")).log_softmax(-1)
            taken = logs.gather(-1, choices[rows][..., None]).squeeze(-1)
            loss = -taken[whole.present[rows]].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            found.append(float(loss.detach()))
        losses.append(sum(found) / len(found))
    return losses


def agreement(policy: LearnedPolicy, decisions: Sequence[Decision]) -> float:
    """Share of layers for which the policy, within the budget, takes the very action that the expert took."""
    same = [a == b for d in decisions for a, b in zip(policy.decide(d.observation()), d.choice, strict=True)]
    return sum(same) / len(same)


def without_signals(decision: Decision) -> Decision:
    """The same decision of a run whose owner tells nothing but the budget."""
    kept = [name if name in ("has_budget", "used", "budget") else "" for name in WORLD]
    return replace(decision, world=torch.where(torch.tensor([bool(name) for name in kept]), decision.world, 0.0))


def returns(decisions: Sequence[Decision]) -> tuple[dict[str, float], int]:
    """(expert -> mean return, number of episodes) over the episodes that every expert played, so that the means can be compared.

    Raises: ConfigError when there is no such episode.
    """
    earned: dict[str, dict[str, float]] = {}
    for d in decisions:
        expert, _, episode = d.source.partition(" ")
        played = earned.setdefault(expert, {})
        played[episode] = played.get(episode, 0.0) + d.reward
    common = set.intersection(*(set(played) for played in earned.values())) if earned else set()
    if not common:
        raise ConfigError.of("traces", sorted(earned), "experts that played the same episodes, at least one")
    return {expert: sum(played[episode] for episode in common) / len(common) for expert, played in earned.items()}, len(common)

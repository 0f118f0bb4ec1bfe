"""Proximal policy optimisation (arXiv:1707.06347): clipped ratios, generalised advantages (1506.02438), entropy, normalised values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional, utils

from mango.errors import ConfigError
from mango.policy.base import Observation
from mango.policy.tinyformer import Batch, LearnedPolicy


class Environment(Protocol):
    """One episode."""

    def reset(self) -> Observation:
        """The first observation."""

    def step(self, choice: Sequence[int]) -> tuple[Observation, float, bool]:
        """Follow a choice: the next observation, the reward, and whether the episode is over (the observation then counts for nothing)."""


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        iterations: collections, each followed by an update. episodes: in each.
        gamma, lam: of the advantages. clip: of the ratio. entropy: weight of the bonus.
        lr: of Adam, falling linearly over the iterations. epochs: over what was collected. minibatch: decisions in a step.
        norm: gradients are clipped to.
    """

    iterations: int = 50
    episodes: int = 16
    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    lr: float = 1e-3
    epochs: int = 4
    minibatch: int = 64
    norm: float = 0.5

    def __post_init__(self) -> None:
        for name in ("iterations", "episodes", "epochs", "minibatch"):
            if not getattr(self, name) >= 1:
                raise ConfigError.of(f"ppo.{name}", getattr(self, name), "an integer >= 1")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError.of(f"ppo.{name}", getattr(self, name), "a number in [0, 1]")
        for name in ("clip", "lr", "norm"):
            if not getattr(self, name) > 0.0:
                raise ConfigError.of(f"ppo.{name}", getattr(self, name), "a number > 0")
        if not self.entropy >= 0.0:
            raise ConfigError.of("ppo.entropy", self.entropy, "a number >= 0")


@dataclass
class Episode:
    """What was seen, chosen and earned; one entry a decision."""

    layers: list[Tensor] = field(default_factory=list)  # (n, features)
    world: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)  # (n, A), what each layer could choose when its turn came
    choices: list[list[int]] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


def sample(scores: Tensor, seen: Observation, generator: torch.Generator) -> tuple[list[int], Tensor, float]:
    """A choice within the budget, drawn layer by layer in random order, with the masks it was drawn under and its log-probability.

    A layer may take what leaves the layers after it their lightest actions, so no draw exceeds the budget and none is thrown away.
    """
    count = len(scores)
    masks, choice, logp = seen.allowed.clone(), [0] * count, 0.0
    least = seen.nbytes.masked_fill(~seen.allowed, torch.iinfo(torch.int64).max).amin(1)
    left = None if seen.budget is None else seen.budget - int(least.sum())
    if left is not None and left < 0:
        raise ConfigError.of("budget", seen.budget, f"at least {int(least.sum())} bytes, the smallest allowed plan of each layer")
    for layer in torch.randperm(count, generator=generator).tolist():
        if left is not None:
            masks[layer] &= seen.nbytes[layer] - least[layer] <= left
        logs = scores[layer].masked_fill(~masks[layer], float("-inf")).log_softmax(-1)
        action = int(torch.multinomial(logs.exp(), 1, generator=generator))
        choice[layer], logp = action, logp + float(logs[action])
        if left is not None:
            left -= int(seen.nbytes[layer, action] - least[layer])
    return choice, masks, logp


def rollout(policy: LearnedPolicy, environment: Environment, generator: torch.Generator) -> Episode:
    """One episode under the policy as it is."""
    episode, done, seen = Episode(), False, environment.reset()
    while not done:
        with torch.no_grad():  # the environment itself trains a model
            scores, value = policy(Batch.of([(seen.layers, seen.world)]))
        choice, masks, logp = sample(scores[0], seen, generator)
        after, reward, done = environment.step(choice)
        row = (seen.layers, seen.world, masks, choice, logp, float(value), reward)
        for name, entry in zip(("layers", "world", "masks", "choices", "logps", "values", "rewards"), row, strict=True):
            getattr(episode, name).append(entry)
        seen = after
    return episode


def advantages(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """Generalised advantages of one episode; the value after its end is 0."""
    found, following, ahead = [0.0] * len(rewards), 0.0, 0.0
    for place in reversed(range(len(rewards))):
        ahead = rewards[place] + gamma * following - values[place] + gamma * lam * ahead
        found[place], following = ahead, values[place]
    return found


class Trainer:
    """PPO's state between updates: optimizer, scale of returns, and how many iterations are done.

    Args:
        policy: trained in place.
        config: settings.
        seed: of sampling and shuffling.
    """

    def __init__(self, policy: LearnedPolicy, config: Config, seed: int = 0) -> None:
        self.policy, self.config = policy, config
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.done = 0
        self.mean, self.scale = 0.0, 1.0  # of returns: the value head speaks in units of them

    def update(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Improve on one collection. Returns: mean return, entropy, value loss, clipped share and approximate divergence."""
        config, rows = self.config, [row for episode in episodes for row in zip(episode.layers, episode.world, strict=True)]
        batch = Batch.of(rows)
        self.policy.learn_scales(batch)
        most = batch.present.shape[1]
        masks = torch.stack([_pad(mask, most, True) for episode in episodes for mask in episode.masks])
        choices = torch.tensor([choice + [0] * (most - len(choice)) for episode in episodes for choice in episode.choices])
        before = torch.tensor([logp for episode in episodes for logp in episode.logps])
        ahead, returns = [], []
        for episode in episodes:
            values = [self.mean + self.scale * value for value in episode.values]
            found = advantages(episode.rewards, values, config.gamma, config.lam)
            ahead += found
            returns += [a + value for a, value in zip(found, values, strict=True)]
        target = torch.tensor(returns)
        # the scale moves slowly, so that what the value head has learned stays nearly true
        share = 1.0 if self.done == 0 else 0.1
        self.mean += share * (float(target.mean()) - self.mean)
        self.scale += share * (float(target.std(unbiased=False)) + 1e-6 - self.scale)
        target = (target - self.mean) / self.scale
        gain = torch.tensor(ahead)
        gain = (gain - gain.mean()) / (gain.std(unbiased=False) + 1e-8)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * max(0.0, 1.0 - self.done / config.iterations)
        report: dict[str, list[float]] = {"entropy": [], "value_loss": [], "clipped": [], "divergence": []}
        for _ in range(config.epochs):
            for rows_ in torch.randperm(len(target), generator=self.generator).split(config.minibatch):
                part = Batch(batch.layers[rows_], batch.world[rows_], batch.present[rows_])
                scores, value = self.policy(part)
                logs = scores.masked_fill(~masks[rows_], float("-inf")).log_softmax(-1)
                taken = logs.gather(-1, choices[rows_][..., None]).squeeze(-1).masked_fill(~part.present, 0.0)
                ratio = (taken.sum(1) - before[rows_]).exp()
                worst = torch.minimum(ratio * gain[rows_], ratio.clamp(1 - config.clip, 1 + config.clip) * gain[rows_])
                entropy = -(logs.exp() * logs.masked_fill(~masks[rows_], 0.0)).sum(-1).masked_fill(~part.present, 0.0).sum(1)
                entropy = entropy / part.present.sum(1)
                value_loss = functional.mse_loss(value, target[rows_])
                loss = 0.5 * value_loss - worst.mean() - config.entropy * entropy.mean()
                self.optimizer.zero_grad()
                loss.backward()
                utils.clip_grad_norm_(self.policy.parameters(), config.norm)
                self.optimizer.step()
                for name, found_ in zip(
                    report,
                    (entropy.mean(), value_loss, ((ratio - 1).abs() > config.clip).float().mean(), (ratio - 1 - ratio.log()).mean()),
                    strict=True,
                ):
                    report[name].append(float(found_.detach()))
        self.done += 1
        mean = sum(sum(episode.rewards) for episode in episodes) / len(episodes)
        return {"return": mean} | {name: sum(values) / len(values) for name, values in report.items()}

    def state(self) -> dict[str, object]:
        """Everything that ``restore`` needs: tensors and plain values."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "done": self.done,
            "returns": [self.mean, self.scale],
        }

    def restore(self, path: Path) -> None:
        """Go on from a saved ``state``."""
        content = torch.load(path, weights_only=True)
        self.policy.load_state_dict(content["policy"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.generator.set_state(content["generator"])
        self.done, (self.mean, self.scale) = content["done"], content["returns"]


Collect = Callable[[LearnedPolicy, Sequence[int]], Sequence[Episode]]  # episodes of these numbers: functions of policy and number alone
Report = Callable[[int, dict[str, float]], None]


def train(trainer: Trainer, collect: Collect, report: Report | None = None, checkpoint: Path | None = None) -> None:
    """Collect and update until all iterations are done; with a checkpoint, go on where it stopped."""
    if checkpoint is not None and checkpoint.is_file():
        trainer.restore(checkpoint)
    config = trainer.config
    while trainer.done < config.iterations:
        first = trainer.done * config.episodes
        found = trainer.update(collect(trainer.policy, range(first, first + config.episodes)))
        if report is not None:
            report(trainer.done, found)
        if checkpoint is not None:
            partial = checkpoint.with_suffix(".part")
            torch.save(trainer.state(), partial)
            partial.replace(checkpoint)


def _pad(mask: Tensor, rows: int, value: bool) -> Tensor:
    return functional.pad(mask, (0, 0, 0, rows - len(mask)), value=value)

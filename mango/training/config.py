"""The one typed configuration: a tier's YAML file, read by ``mango train`` and by the workflow alike.

Every class forbids unknown keys. Errors name the field by its dotted path, its value and what is legal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from mango.errors import ConfigError, MissingExtra

try:
    from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
except ImportError as error:
    raise MissingExtra.of("pydantic", "experiments", "mango.training") from error

from mango.training.messages import explain
from mango.training.task import GPT, AnyData, Count, Llama, Model, Positive, Strict, Task
from mango.training.yamlfile import parse, read

T = TypeVar("T", bound=BaseModel)


class Lora(Strict):
    """Factors beside a frozen base: see ``mango.models.adapters``."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="the factors' product is scaled by alpha / rank")
    base: Literal["float32", "bfloat16", "nf4"] = Field("float32", description="how the blocks' frozen matrices are kept")


class Variant(Strict):
    """One method: an optimizer of ``mango.optim.REGISTRY`` and its options, and how its gradients come about."""

    label: str | None = Field(None, description="name in tables and figures; null = the variant's key")
    optimizer: str
    options: dict[str, Any] = Field({})
    freeze: bool = Field(False, description="the layers under test do not train")
    mole: dict[str, Any] | None = Field(None, description="fields of mango.mole.MoleConfig, for the layers that it converts; null = none")
    lora: Lora | None = Field(None, description="train low-rank factors beside a frozen LLaMA; null = none")
    recompute: bool = Field(False, description="activation checkpointing: keep each block's input alone and compute the block again")
    seeds: Annotated[list[Count], Field(min_length=1)] | None = Field(None, description="null = the experiment's; fewer for an ablation")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="the values that were tried for each option when it was tuned"
    )
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="fields of Mango's plan and values for each: one more variant for every value, in which that field alone differs"
    )

    def varied(self, name: str) -> Iterator[tuple[str, Variant]]:
        """(name, variant) of this one, and of those that ``vary`` asks for, whose rates are this one's and were not tuned apart."""
        plain = self.model_copy(update={"vary": {}})
        yield name, plain
        for field, values in self.vary.items():
            for value in values:
                options = self.options | {"plan": {**self.options.get("plan", {}), field: value}}
                shown = str(value).lower()
                update = {"label": f"{self.label or name}, {field.replace('_', ' ')} {shown}", "options": options, "grid": {}}
                yield f"{name}-{field}-{shown}", plain.model_copy(update=update)


class Controls(Strict):
    """Names of the two control variants (see ``mango.training.judge``)."""

    dense: str
    frozen: str


class Experiment(Task):
    """A task and the methods to compare on it."""

    seeds: Annotated[list[Count], Field(min_length=1)]
    minutes: Annotated[float, Field(gt=0)] = Field(description="declared share of the tier's time")
    controls: Controls | None = None
    variants: Annotated[dict[str, Variant], Field(min_length=1)]

    @field_validator("variants", mode="after")
    @classmethod
    def _vary(cls, variants: dict[str, Variant]) -> dict[str, Variant]:
        found: dict[str, Variant] = {}
        for name, variant in (each for key, given in variants.items() for each in given.varied(key)):
            if name in found:
                raise ValueError(f"the variant {name} is not legal: one of its name exists, by itself or through vary")
            found[name] = variant
        return found

    @model_validator(mode="after")
    def _controls_exist(self) -> Self:
        for role, name in self.controls.model_dump().items() if self.controls is not None else ():
            if name not in self.variants:
                raise ValueError(f"controls.{role} = {name!r} is not legal: one of {', '.join(sorted(self.variants))}")
        return self

    def seeds_of(self, variant: str) -> list[int]:
        """The seeds of one variant: its own, or else the experiment's."""
        return self.variants[variant].seeds or self.seeds


class Theory(Strict):
    """Which theorems the tier checks."""

    seed: Count = 0
    theorems: list[str] | None = Field(None, description="null = all")


class Contexts(Strict):
    """Memory against context length, measured apart from training: see workflow/scripts/contexts.py."""

    depth: Positive
    vocabulary: Annotated[int, Field(ge=256)] = Field(65536, description="that embedding and head are sized for")
    lengths: Annotated[list[Positive], Field(min_length=1)] = Field(description="tokens")
    batch: Positive = 1
    steps: Annotated[int, Field(ge=2)] = Field(6, description="at each length; the first is not timed")
    cap: Annotated[float, Field(gt=0)] = Field(description="GiB that the longest context may take")
    limit: Positive = Field(1 << 18, description="the longest context that is tried")


class PolicyTask(Strict):
    """A short training run that policies are trained or judged on."""

    data: AnyData
    model: Model
    lr: Annotated[float, Field(gt=0)]
    batch: Positive = 32
    exclude: list[str] = Field([])


class PolicyAblation(Strict):
    """Some policies judged once more on the held-out tasks, with one thing changed."""

    policies: Annotated[list[str], Field(min_length=1)]
    budgets: Annotated[list[float], Field(min_length=1)]
    seeds: list[Count] | None = Field(None, description="null = the experiment's")
    error: Literal["codec", "gradient", "none"] = Field("codec", description="how Mango keeps the error, whatever is chosen")
    ranks: list[float] | None = Field(None, description="to choose from; null = those of mango.policy.actions; [1.0] = no low-rank stage")


class Policy(Strict):
    """The experiment on policies (see ``mango.policy``): what they are trained on, and the tasks and budgets that judge them."""

    minutes: Annotated[float, Field(gt=0)] = Field(description="declared share of the tier's time, of the evaluation alone")
    seeds: Annotated[list[Count], Field(min_length=1)] = Field(description="of the evaluation")
    decisions: Positive = 5
    every: Positive = Field(8, description="steps between two decisions")
    weights: Annotated[list[float], Field(min_length=4, max_length=4)] = Field(
        [1.0, 0.5, 0.05, 0.05], description="of loss, memory, seconds and joules in the reward; all > 0 for Pareto-optimal choices"
    )
    policies: Annotated[list[str], Field(min_length=1)] = Field(
        description="names of mango.policy.REGISTRY, or what the rules of this tier train: cloned-<kind> or scratch"
    )
    oracle_seeds: list[Count] = Field([], description="of the greedy oracle, whose runs take about ten times as long; empty = not judged")
    budgets: Annotated[list[float], Field(min_length=1)] = Field(description="of the evaluation, bytes of state for each value")
    held_out: Annotated[dict[str, PolicyTask], Field(min_length=1)]
    ablations: dict[str, PolicyAblation] = Field({})
    train: dict[str, PolicyTask] = Field({}, description="tasks of traces and of PPO, which run only when they are asked for")
    train_budgets: list[float] = Field([])
    traces: Count = Field(0, description="episodes of each expert that is a rule")
    oracle_traces: Count = Field(0, description="of the greedy oracle")
    epochs: Count = Field(0, description="of imitation")
    iterations: Count = Field(0, description="of PPO")
    episodes: Positive = Field(12, description="in an iteration of PPO")
    workers: Positive = Field(1, description="processes that play them")


class TierConfig(Strict):
    """A whole tier: workflow/config/<tier>.yaml."""

    tier: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    theory: Theory = Field(default_factory=lambda: Theory(theorems=None))
    contexts: Contexts | None = None
    wandb: bool = Field(False, description="also log to Weights & Biases, offline unless WANDB_MODE says otherwise")
    experiments: Annotated[dict[str, Experiment], Field(min_length=1)]
    policy: Policy | None = Field(None, description="null = this tier does not compare policies")


class RunConfig(Task):
    """What one variant of one experiment does; its hash is the run's identity. The seed and the names are kept beside it."""

    optimizer: str
    options: dict[str, Any] = Field({})
    freeze: bool = False
    mole: dict[str, Any] | None = None
    lora: Lora | None = None
    recompute: bool = False

    @model_validator(mode="after")
    def _only_language_models_recompute(self) -> Self:
        if not isinstance(self.model, GPT):
            for field, value in (("recompute", self.recompute), ("train.sample", self.train.sample)):
                if value:
                    raise ValueError(f"{field} = {value!r} is not legal: model.name = gpt alone has it")
        return self

    @model_validator(mode="after")
    def _factors_have_a_frozen_llama(self) -> Self:
        if self.lora is not None and (not isinstance(self.model, Llama) or self.freeze or self.mole is not None):
            raise ValueError(f"lora = {self.lora.model_dump()} is not legal: only with model.name = llama, without freeze and mole")
        return self

    @model_validator(mode="after")
    def _exclude_is_the_tasks(self) -> Self:
        if "exclude" in self.options:
            raise ValueError(
                f"options.exclude = {self.options['exclude']!r} is not legal: "
                "the matrices under test are the task's, the same for every method and control: give exclude beside data and model"
            )
        return self

    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class RunSpec(Strict):
    """One run: who it is and what it does."""

    experiment: str
    variant: str
    tier: str
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    label: str
    config: RunConfig
    wandb: bool = False
    energy: Literal["record", "log", "require"] = Field(
        "record", description="joules in the record where they can be measured; log: in every line of metrics.jsonl too; require: or fail"
    )


def load(path: str | Path) -> TierConfig:
    """Read and validate a tier's file.

    Raises: ConfigError naming the file, the field, its value and what is legal.
    """
    return validated(TierConfig, read(Path(path)), str(path))


def resolve(
    tier: TierConfig,
    experiment: str,
    variant: str,
    seed: int,
    overrides: list[str] | None = None,
    wandb: bool = False,
    energy: str = "record",
) -> RunSpec:
    """The run that ``mango train`` names.

    Args:
        overrides: ``key=value`` each; the key is a dotted path into ``RunConfig`` ("train.steps", "options.lr"), the value is YAML.

    Raises: ConfigError for an unknown experiment, variant or key, or an illegal value.
    """
    if experiment not in tier.experiments:
        raise ConfigError.of("experiment", experiment, f"one of {', '.join(sorted(tier.experiments))} (tier {tier.tier})")
    chosen = tier.experiments[experiment]
    if variant not in chosen.variants:
        raise ConfigError.of("variant", variant, f"one of {', '.join(sorted(chosen.variants))} (experiment {experiment})")
    method = chosen.variants[variant]
    config: dict[str, Any] = chosen.model_dump(include=set(Task.model_fields)) | method.model_dump(
        include={"optimizer", "options", "freeze", "mole", "lora", "recompute"}
    )
    for override in overrides or []:
        _set(config, override)
    spec = {
        "experiment": experiment,
        "variant": variant,
        "tier": tier.tier,
        "seed": seed,
        "label": method.label or variant,
        "wandb": wandb or tier.wandb,
        "energy": energy,
    }
    run_config = validated(RunConfig, config, "--set" if overrides else f"experiments.{experiment}")
    return validated(RunSpec, spec | {"config": run_config}, "run")


def validated(model: type[T], value: Any, where: str) -> T:
    """``value`` as ``model``. Raises: ConfigError with the first thing that is wrong, prefixed with ``where``."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, model)}") from None


def _set(config: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError.of("--set", override, "key=value, for example train.steps=100")
    *parents, last = key.split(".")
    place = config
    for depth, name in enumerate(parents):
        inner = place.get(name)
        if inner is None and parents[0] in ("options", "mole", "lora"):  # a part that the file leaves out
            inner = place[name] = {}
        if not isinstance(inner, dict):
            sections = [key for key, below in place.items() if isinstance(below, dict)]
            raise ConfigError.of("--set " + ".".join(parents[: depth + 1]), value, "one of " + ", ".join(sorted(sections or place)))
        place = inner
    place[last] = parse(value, f"--set {key}")

"""The run record, ``run.json``: validated when it is written and when it is read; ``mango.training.schema`` exports its JSON schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mango.errors import ConfigError
from mango.training import atomic
from mango.training.config import RunConfig, validated
from mango.training.task import Strict

VERSION = 1


class Git(Strict):
    """None where mango was not imported from a git checkout."""

    commit: str | None
    dirty: bool | None


class Hardware(Strict):
    cpu: str
    cores: int
    device: Literal["cpu", "cuda"]
    gpu: str | None
    driver: str | None


class DataIdentity(Strict):
    """The data actually used; ``title`` is for captions."""

    name: str
    source: Literal["local", "download", "embedded"]
    title: str
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 over every split's content")
    train: int
    test: int
    validation: int = 0
    corrupt: int = Field(0, ge=0, description="damaged images or shards that were left out, as the configuration allows")
    empty: list[str] = Field([], description="classes without training images")
    majority: float | None = Field(None, description="share of the test split's larger class, for verdicts: what a constant answer reaches")


class Throughput(Strict):
    value: float = Field(ge=0, description="targets (images, bytes, tokens, reviews) per second of training steps (evaluation left out)")
    unit: str


class Scores(Strict):
    """``test_*`` when the test set was evaluated, ``validation_*`` when the configuration chose the validation set.

    Losses are mean cross-entropies in nats. The task's own metric is accuracy (and top-5 accuracy) for images, accuracy for
    verdicts on reviews, and bits per byte for text.
    """

    step: int
    train_loss: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    test_top5: float | None = None
    test_bits_per_byte: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    validation_top5: float | None = None
    validation_bits_per_byte: float | None = None


class Metrics(Strict):
    final: Scores
    best: Scores = Field(description="at the evaluation with the lowest loss")


class Memory(Strict):
    """Bytes (see ``mango.telemetry.MemoryLedger``)."""

    parameters: int
    gradients: int
    optimizer_state: int = Field(description="everything kept between steps beside the parameters")
    saved_activations: int = Field(description="largest sum of what autograd kept for the backward pass, on the first step")
    rss_peak: int
    device_peak_allocated: int | None
    device_peak_reserved: int | None


class Parameters(Strict):
    total: int
    compressed: int = Field(
        description="those of the layers under test, which methods compress and the frozen control freezes (mango.optim.split)"
    )


class Energy(Strict):
    """``joules`` is null when nothing measured it, and then ``reason`` says why."""

    joules: float | None
    source: str | None
    reason: str | None
    missed: int = Field(0, ge=0, description="samples that the source did not answer")
    malformed: int = Field(0, ge=0, description="samples whose answer was no power")


class PlanStep(Strict):
    step: int
    layers: dict[str, dict[str, Any]]


class StepCondition(Strict):
    """T7 for the plans that a policy chose in this run: largest step sizes of EF21 for L = L_tilde = 1 (``mango.policy.base``)."""

    policy: str
    alpha_min: float = Field(description="the contraction that the policy declares for every plan it may choose")
    least: float = Field(description="the least contraction of the plans that it chose")
    step_declared: float = Field(description="by T7 (1), with alpha_min")
    step_schedule: float = Field(description="by T7 (2), for the sequence of plans as it was")


class Contraction(Strict):
    """At one step of one layer: the certified share of the squared norm that compression keeps, and the measured one."""

    step: int
    layer: str
    certified: float
    measured: float
    energy: float | None = None
    drift: float | None = None


class Mole(Strict):
    """What ``mango.mole.convert`` did."""

    converted: dict[str, str] = Field(description="module -> what it became")
    skipped: dict[str, str] = Field(description="module that was left alone -> why")


class Context(Strict):
    """What one step takes at one context length."""

    tokens: int
    saved_activations: int | None = Field(description="bytes that autograd keeps for the backward pass; null when it ran out of memory")
    peak: int | None = Field(description="bytes: what the device reserved; on a CPU the ledger's categories added up")
    step_seconds: float | None


class RunRecord(Strict):
    """One completed run."""

    schema_version: Literal[1]
    experiment: str
    variant: str
    label: str
    tier: str
    seed: int
    config: RunConfig
    config_hash: str = Field(pattern="^[0-9a-f]{64}$")
    git: Git
    lock_hash: str | None
    packages: dict[str, str]
    hardware: Hardware
    data: DataIdentity
    started: str = Field(description="UTC, ISO 8601")
    resumed: list[int] = Field(description="the steps at which the run was resumed from a checkpoint")
    steps: int
    wall_seconds: float = Field(ge=0)
    throughput: Throughput
    metrics: Metrics
    memory: Memory
    parameters: Parameters
    energy: Energy
    plan: list[PlanStep] = Field(description="what is kept per layer, at each step where it changed; empty for methods without a plan")
    step_condition: StepCondition | None = Field(None, description="null where no policy chose plans")
    contraction: list[Contraction] = Field(description="at the evaluation steps; empty for methods that certify nothing")
    mole: Mole | None = Field(None, description="null when no layer was converted")
    contexts: list[Context] = Field([], description="measured at several context lengths, by workflow/scripts/contexts.py")
    longest_context: int | None = Field(None, description="tokens that fit under the cap, to 1/16 of themselves; null when not looked for")
    memory_cap: int | None = Field(None, description="bytes; null when the longest context was not looked for")
    sample: str | None = Field(None, description="what the trained language model wrote; bytes that are no character are U+FFFD")
    status: Literal["completed"]


def save(path: Path, record: RunRecord) -> None:
    """Write the record atomically, validated as it will be read. Raises: ConfigError, OSError."""
    text = record.model_dump_json(indent=1)
    parse(text, path)
    atomic.write(path, lambda file: file.write(text.encode() + b"\n"))


def load(path: str | Path) -> RunRecord:
    """Read a record.

    Raises: ConfigError naming the file, the field, its value and what is legal.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError.of("run record", str(path), "an existing run.json")
    return parse(path.read_text(), path)


def parse(text: str, path: Path) -> RunRecord:
    """The record in a JSON text; ``path`` is named in errors."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    return validated(RunRecord, content, str(path))

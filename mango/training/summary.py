"""What a run gathers while it trains, and the record that it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mango.optim import Mango
from mango.optim.plan import LayerPlan
from mango.telemetry import PowerSampler
from mango.telemetry.memory import device_peaks
from mango.training import provenance, record
from mango.training.config import RunSpec
from mango.training.record import RunRecord


@dataclass
class Counters:
    """Everything that a run has gathered so far, in plain values: it travels in the checkpoint and becomes the record."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # of the steps since the last train line
    correct: int = 0
    seen: int = 0
    trained: int = 0  # targets of all steps
    train_loss: float | None = None  # of the last train line
    lowest: float | None = None  # loss of all evaluations
    final: dict[str, float | None] = field(default_factory=dict)
    best: dict[str, float | None] = field(default_factory=dict)
    wall_seconds: float = 0.0
    step_seconds: float = 0.0
    joules: float | None = 0.0
    gradients: int = 0
    saved_activations: int = 0
    rss_peak: int = 0
    memory: list[dict[str, int]] = field(default_factory=list)  # bytes by category after the steps that end a train line
    missed: int = 0
    malformed: int = 0
    skipped: list[str] = field(default_factory=list)  # damaged examples that were left out
    plan: list[dict[str, Any]] = field(default_factory=list)
    contraction: list[dict[str, Any]] = field(default_factory=list)
    started: str = ""
    resumed: list[int] = field(default_factory=list)


def plan_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the optimizer keeps per layer, from step 0 on; empty when it has no plans."""
    plans = optimizer.plans() if isinstance(optimizer, Mango) else {}
    layers = {name: plan.plain() for name, plan in plans.items() if plan is not None}
    return [{"step": 0, "layers": layers}] if layers else []


def condition_of(optimizer: torch.optim.Optimizer, plan: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any] | None:
    """T7's step-size condition for the plans that a policy chose; None where none did."""
    policy = optimizer.policy if isinstance(optimizer, Mango) else None
    if policy is None or not isinstance(optimizer, Mango):
        return None
    from mango.policy.base import step_condition

    shapes = optimizer.shapes()
    own = {name: base for name, base in optimizer.own_plans().items() if base is not None}
    declared = min(policy.alpha_min([shapes[name]], base) for name, base in own.items())
    history = [(row["step"], [LayerPlan.of(row["layers"][name]) for name in own]) for row in plan]
    found = step_condition(declared, [shapes[name] for name in own], history, steps)
    return {"policy": type(policy).__name__, **asdict(found)}


def record_of(
    spec: RunSpec,
    counters: Counters,
    *,
    device: torch.device,
    data: dict[str, Any],
    unit: str,
    memory: dict[str, int],
    parameters: dict[str, int],
    power: PowerSampler,
    condition: dict[str, Any] | None = None,
    mole: dict[str, Any] | None = None,
    sample: str | None = None,
) -> RunRecord:
    """The validated record of a completed run.

    Args:
        data: the identity of the data used.
        unit: of the throughput.
        memory: bytes of "parameters" and "optimizer_state".
        parameters: counts, "total" and "compressed".
        condition: T7's, see ``mango.training.record.StepCondition``.
        mole: what was converted, see ``mango.training.record.Mole``.
        sample: text that the trained model wrote.
    """
    allocated, reserved = device_peaks(device)
    measured = counters.joules is not None
    content = {
        "schema_version": record.VERSION,
        "experiment": spec.experiment,
        "variant": spec.variant,
        "label": spec.label,
        "tier": spec.tier,
        "seed": spec.seed,
        "config": spec.config.model_dump(),
        "config_hash": spec.config.hash(),
        "git": provenance.git(),
        "lock_hash": provenance.lock_hash(),
        "packages": provenance.packages(),
        "hardware": provenance.hardware(device),
        "data": data,
        "started": counters.started,
        "resumed": counters.resumed,
        "steps": counters.step,
        "wall_seconds": counters.wall_seconds,
        "throughput": {"value": counters.trained / counters.step_seconds, "unit": unit},
        "metrics": {"final": counters.final, "best": counters.best},
        "memory": {
            **memory,
            "gradients": counters.gradients,
            "saved_activations": counters.saved_activations,
            "rss_peak": counters.rss_peak,
            "device_peak_allocated": allocated,
            "device_peak_reserved": reserved,
        },
        "parameters": parameters,
        "energy": {
            "joules": counters.joules,
            "source": power.source if measured else None,
            "reason": None if measured else power.reason or "the part before the last resume was not measured",
            "missed": counters.missed,
            "malformed": counters.malformed,
        },
        "plan": counters.plan,
        "step_condition": condition,
        "contraction": counters.contraction,
        "mole": mole,
        "sample": sample,
        "status": "completed",
    }
    return record.validated(RunRecord, content, "run record")

"""What run records say of an experiment: its controls, its verdict, its table. ``figures`` draws it, ``report`` hands it to the paper.

Everything is decided by settings and records, never by a variant's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from common import RunSet

from mango.mole import MoleConfig
from mango.training import judge
from mango.training.record import RunRecord

METRICS = {"accuracy": ("test accuracy", ".1%"), "bits_per_byte": ("test bits per byte", ".3f")}  # label, format

# ---------------------------------------------------------------- who is who


def metric(runs: RunSet) -> str:
    """The task's own metric: the one that its records carry."""
    final = runs.every()[0].metrics.final
    return next(name for name in METRICS if getattr(final, f"test_{name}") is not None)


def controls(runs: RunSet) -> tuple[str | None, str | None]:
    """(dense, frozen): frozen is the variant whose layers under test do not train, dense the one that trains them by the same optimizer."""
    frozen = next((name for name, group in runs.runs.items() if group[0].config.freeze), None)
    if frozen is None:
        return None, None
    reference = runs.runs[frozen][0].config
    plain = [name for name, group in runs.runs.items() if not group[0].config.freeze and not kept_otherwise(group[0])]
    same = [name for name in plain if runs.runs[name][0].config.optimizer == reference.optimizer]
    return min(same, key=lambda name: (runs.runs[name][0].config.options != reference.options, name), default=None), frozen


def dials(fields: Mapping[str, Any]) -> tuple[str, str, str]:
    """How converted layers keep their inputs and make their gradients: the two dials, and what becomes of the rest of a gradient."""
    config = MoleConfig.of(fields)
    return config.store, config.gradient, config.residual


def kept_otherwise(run: RunRecord) -> bool:
    """Whether activations are kept in another way than autograd's (codes, or computed again), or the weights are (a frozen base)."""
    return run.config.mole is not None or run.config.recompute or run.config.lora is not None


def final_losses(runs: RunSet, name: str | None) -> dict[int, float]:
    """Seed -> final test loss."""
    return {run.seed: run.metrics.final.test_loss for run in runs.runs.get(name, [])}  # type: ignore[arg-type,misc]


def plan(runs: RunSet, name: str) -> dict[str, Any]:
    """The fields of Mango's plan that a variant sets."""
    return runs.runs[name][0].config.options.get("plan", {})


def group(runs: RunSet, name: str) -> str:
    """ "control", "peer", "mango" (by its optimizer), or "mole" (converted layers, whatever the optimizer)."""
    if name in controls(runs):
        return "control"
    config = runs.runs[name][0].config
    return "mole" if config.mole is not None else "mango" if config.optimizer == "mango" else "peer"


def state(runs: RunSet, name: str) -> float:
    """Bytes of optimizer state per parameter of the model."""
    return float(np.mean([run.memory.optimizer_state / run.parameters.total for run in runs.runs[name]]))


def kept(runs: RunSet, name: str) -> float:
    """Bytes that autograd kept for the backward pass."""
    return float(np.mean([run.memory.saved_activations for run in runs.runs[name]]))


def ordered(runs: RunSet) -> list[str]:
    """Dense and frozen, then the peers, Mango's variants and converted models, each by falling state, or by falling bytes kept."""
    place = {"control": 0, "peer": 1, "mango": 2, "mole": 3}

    def key(name: str) -> tuple[Any, ...]:
        size = kept(runs, name) if group(runs, name) == "mole" else state(runs, name)
        return place[group(runs, name)], runs.runs[name][0].config.freeze, -size, name

    return sorted(runs.runs, key=key)


def headline(runs: RunSet) -> str | None:
    """The variant the text speaks of, chosen by settings and never by results. Where layers are converted: the library's default store
    under the dense control's optimizer. Elsewhere: complete Mango, the largest relative rank up to 1/8, the fewest settings that differ
    from the defaults."""
    dense, _ = controls(runs)
    for name in sorted(runs.runs) if dense else []:
        config, plain = runs.runs[name][0].config, runs.runs[dense][0].config
        if config.mole is not None and dials(config.mole) == dials({}) and config.optimizer == plain.optimizer:
            return name
    found = []
    for name in runs.runs:
        settings = plan(runs, name)
        complete = settings.get("error") != "none" and settings.get("scouts", 1) > 0 and settings.get("residual", True)
        rank = settings.get("rank", 1 / 8)
        if group(runs, name) == "mango" and complete and isinstance(rank, float) and rank <= 1 / 8:
            found.append((rank, -len(settings), name))
    return max(found)[-1] if found else None


# ---------------------------------------------------------------- what came out


def spread(values: list[float]) -> float | None:
    """Standard deviation over seeds; not defined for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def task(runs: RunSet) -> judge.Gap | None:
    """The gap between the controls; None when one has no runs."""
    losses = [list(final_losses(runs, control).values()) for control in controls(runs)]
    return judge.gap(*losses) if all(losses) else None


def share(runs: RunSet, name: str) -> judge.Recovered:
    """Recovered gap of a variant, by the rule of mango.training.judge."""
    losses = [list(final_losses(runs, control).values()) for control in controls(runs)]
    if not all(losses):
        return judge.Recovered(None, {}, None, "a control has no runs")
    return judge.recovered(final_losses(runs, name), *losses)


def table(runs: RunSet) -> pd.DataFrame:
    """One row per variant."""
    rows = {}
    for name in ordered(runs):
        records = runs.runs[name]
        values = {
            metric(runs): [getattr(run.metrics.final, f"test_{metric(runs)}") for run in records],
            "loss": [run.metrics.final.test_loss for run in records],
        }
        rows[name] = {
            "label": records[0].label,
            "group": group(runs, name),
            "seeds": len(records),
            **{key: float(np.mean(value)) for key, value in values.items()},
            **{f"{key}_std": spread(value) for key, value in values.items()},
            "recovered": share(runs, name).value,
            "recovered_std": share(runs, name).std,
            "state": state(runs, name),
            "kept": kept(runs, name) / kept(runs, controls(runs)[0] or name),
            "throughput": float(np.mean([run.throughput.value for run in records])),
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(object).where(lambda frame: frame.notna(), None)


def contraction(runs: RunSet) -> pd.DataFrame:
    """Certified and measured share of the squared norm, one row per variant, seed, step and layer."""
    columns = ["variant", "seed", "step", "layer", "certified", "measured"]
    rows = [
        {"variant": name, "seed": run.seed, **entry.model_dump(include={"step", "layer", "certified", "measured"})}
        for name, records in runs.runs.items()
        for run in records
        for entry in run.contraction
    ]
    return pd.DataFrame(rows, columns=columns)

"""What run records say of an experiment: its controls, its verdict, its table. ``figures`` draws it, ``report`` hands it to the paper.

Everything is decided by settings and records, never by a variant's name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from common import RunSet

from mango.training import judge

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
    same = [name for name, group in runs.runs.items() if not group[0].config.freeze and group[0].config.optimizer == reference.optimizer]
    return min(same, key=lambda name: (runs.runs[name][0].config.options != reference.options, name), default=None), frozen


def final_losses(runs: RunSet, name: str | None) -> dict[int, float]:
    """Seed -> final test loss."""
    return {run.seed: run.metrics.final.test_loss for run in runs.runs.get(name, [])}  # type: ignore[arg-type,misc]


def plan(runs: RunSet, name: str) -> dict[str, Any]:
    """The fields of Mango's plan that a variant sets."""
    return runs.runs[name][0].config.options.get("plan", {})


def group(runs: RunSet, name: str) -> str:
    """ "control", "peer" or "mango"."""
    if name in controls(runs):
        return "control"
    return "mango" if runs.runs[name][0].config.optimizer == "mango" else "peer"


def state(runs: RunSet, name: str) -> float:
    """Bytes of optimizer state per parameter of the model."""
    return float(np.mean([run.memory.optimizer_state / run.parameters.total for run in runs.runs[name]]))


def ordered(runs: RunSet) -> list[str]:
    """Dense and frozen, then the peers and then Mango's variants, each by falling state."""
    place = {"control": 0, "peer": 1, "mango": 2}
    return sorted(runs.runs, key=lambda name: (place[group(runs, name)], runs.runs[name][0].config.freeze, -state(runs, name), name))


def headline(runs: RunSet) -> str | None:
    """The variant the text speaks of, chosen by settings and never by results: complete Mango, the largest relative rank up to 1/8, the
    fewest settings that differ from the defaults."""
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

"""The numbers of one experiment that the paper prints."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import common
import numpy as np
from common import Numbers, RunSet
from experiment import METRICS, contraction, controls, group, headline, metric, plan, table, task

DIALS = {
    ("error", "none"): "without error feedback",
    ("error", "gradient"): "with the error kept in single precision",
    ("scouts", 0): "without scouts",
    ("residual", False): "without the residual direction",
}


def options_text(options: Mapping[str, Any]) -> str:
    """Options beside the learning rate, the plan's fields among them."""
    flat = {key: value for key, value in options.items() if key not in ("lr", "plan")} | options.get("plan", {})
    return ", ".join(f"{key} = {value:g}" if isinstance(value, float) else f"{key} = {value}" for key, value in flat.items())


def ablates(runs: RunSet, name: str) -> str | None:
    """What sets a variant apart from the headline's, when it is exactly one dial of the plan."""
    reference = headline(runs)
    if reference is None or group(runs, name) != "mango" or group(runs, reference) != "mango" or name == reference:
        return None
    ours, theirs = plan(runs, name), plan(runs, reference)
    changed = [field for field in {**ours, **theirs} if ours.get(field) != theirs.get(field)]
    if len(changed) != 1 or changed[0] not in ours:
        return None
    field, value = changed[0], ours[changed[0]]
    if field == "rank":
        return f"at rank {Fraction(value).limit_denominator(1024)}"
    return DIALS.get((field, value), f"with {field} = {value:g}" if isinstance(value, float) else f"with {field} = {value}")


def tried(runs: RunSet, name: str) -> str | None:
    """The learning rates that tuning tried, as the tier's settings record them."""
    rates = common.grids(runs.tier, runs.every()[0].experiment).get(name, {}).get("lr")
    return ", ".join(f"{rate:g}" for rate in rates) if rates else None


def energy(runs: RunSet) -> str:
    joules = [run.energy.joules for run in runs.every()]
    if any(each is None for each in joules):
        return "not measured: " + runs.common(lambda run: run.energy.reason)
    return f"{sum(filter(None, joules)) / 1000:.0f} kJ in all, by {runs.common(lambda run: run.energy.source)}"


def report(runs: RunSet, prefix: str, numbers: Numbers) -> None:
    """Everything that the paper says of an experiment, under ``prefix``."""

    def add(key: str, value: Any, format: str = "text", **more: Any) -> None:
        numbers.add(f"{prefix}.{key}", value, format, tier=runs.tier, **more)

    rows, pairs, gap = table(runs), contraction(runs), task(runs)
    dense, frozen = controls(runs)
    add("tier_label", runs.label)
    add("data", runs.common(lambda run: run.data.title))
    add("machine", runs.common(lambda run: f"{run.hardware.gpu or run.hardware.cpu}, {run.hardware.cores} cores"))
    add("torch", runs.common(lambda run: run.packages["torch"]))
    for key, value in {
        "train": lambda run: run.data.train,
        "test": lambda run: run.data.test,
        "steps": lambda run: run.steps,
        "batch": lambda run: run.config.train.batch,
        "parameters": lambda run: run.parameters.total,
    }.items():
        add(key, max(value(run) for run in runs.every()), ",d")
    add("under_test", max(run.parameters.compressed / run.parameters.total for run in runs.every()), ".0%")
    for key in ("sequence", "depth", "width", "ffn"):
        settings = runs.every()[0].config.data.model_dump() | runs.every()[0].config.model.model_dump()
        if key in settings:
            add(key, settings[key], "d")
    add("seeds", int(rows["seeds"].min()), "d")
    add("seeds_most", int(rows["seeds"].max()), "d")
    add("runs", len(runs.every()), "d")
    add("wall", sum(run.wall_seconds for run in runs.every()) / 60, ".1f", unit="min")
    add("energy", energy(runs))
    add("throughput_unit", runs.common(lambda run: run.throughput.unit))
    add("metric", metric(runs))
    add("variants", list(rows.index), "list")
    add("dense", dense)
    add("frozen", frozen)
    add("headline", headline(runs))
    add("gap", gap.value if gap else None, ".3f")
    add("gap_ratio", gap.ratio if gap and gap.ratio is not None and np.isfinite(gap.ratio) else None, ".1f")
    add("gap_passes", bool(gap and gap.passed), "bool")
    add("gap_reason", gap.reason if gap else "a control has no runs")
    for name, row in rows.iterrows():
        config = runs.runs[str(name)][0].config
        add(f"{name}.label", row["label"])
        add(f"{name}.group", row["group"])
        add(f"{name}.optimizer", config.optimizer)
        add(f"{name}.lr", config.options.get("lr"), "g")
        add(f"{name}.options", options_text(config.options) or "none")
        add(f"{name}.grid", tried(runs, str(name)))
        add(f"{name}.ablates", ablates(runs, str(name)))
        add(f"{name}.seeds", row["seeds"], "d")
        add(f"{name}.throughput", row["throughput"], ",.0f")
        add(f"{name}.state", row["state"], ".3f")
        add(f"{name}.kept", row["kept"], ".1%")
        for key, format in ((metric(runs), METRICS[metric(runs)][1]), ("loss", ".3f"), ("recovered", ".3f")):
            add(f"{name}.{key}", row[key], format)
            add(f"{name}.{key}_std", row[f"{key}_std"], format)
    ratio = pairs["measured"] / pairs["certified"].where(pairs["certified"] > 0)
    means = pairs.groupby(["variant", "layer"])[["certified", "measured"]].mean()
    add("contraction.count", len(pairs), "d")
    add("contraction.below", int((pairs["measured"] < pairs["certified"]).sum()), "d")
    add("contraction.layers", len(means), "d")
    add("contraction.layers_below", int((means["measured"] < means["certified"]).sum()), "d")
    add("contraction.median", float(ratio.median()) if ratio.notna().any() else None, ".2f")
    add("contraction.smallest", float(ratio.min()) if ratio.notna().any() else None, ".2f")
    add("contraction.kept", float(pairs["measured"].median()) if len(pairs) else None, ".1%")

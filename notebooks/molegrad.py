"""What MoleGrad's notebook shows beside what every experiment shows: bytes kept, captured energy, memory against context length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import common
import numpy as np
import pandas as pd
from common import Numbers, RunSet
from experiment import controls, final_losses, group, headline, kept_otherwise, table, task
from figures import Looks, front
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

MIB = 1 << 20

# ---------------------------------------------------------------- quality against bytes kept


def draw_kept(runs: RunSet, look: Looks) -> Figure:
    """Recovered gap, or the loss where there is no verdict, against the bytes kept for the backward pass, dense = 1."""
    rows = table(runs)
    _, frozen = controls(runs)
    rows = rows.drop(index=[frozen] if frozen else [])
    field, sign = ("recovered", 1.0) if rows["recovered"].notna().all() else ("loss", -1.0)
    figure, axis = plt.subplots(figsize=(common.TEXT_WIDTH, 3.2))
    for name, row in rows.iterrows():
        marker = {**look[str(name)], "linestyle": "none", "markersize": 5, "capsize": 2, "elinewidth": 0.7}
        axis.errorbar(row["kept"], row[field], yerr=row[f"{field}_std"] or 0.0, label=row["label"], **marker)
    edge = front((x, sign * y) for x, y in zip(rows["kept"], rows[field], strict=True))
    axis.step(edge[:, 0], sign * edge[:, 1], where="post", color="#9a9a9a", linewidth=0.8, linestyle="-", marker="none", zorder=0)
    axis.set(xlabel="bytes kept for the backward pass (dense = 1)", ylabel={"recovered": "recovered gap", "loss": "test loss"}[field])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def own_share(runs: RunSet, name: str) -> float | None:
    """The recovered gap of a converted model with the same optimizer's unconverted runs as dense, over the seeds that it has in common
    with both controls; None without these, or without a verdict."""
    optimizer, (_, frozen), gap = runs.runs[name][0].config.optimizer, controls(runs), task(runs)
    plain = [other for other in runs.runs if other != frozen and runs.runs[other][0].config.optimizer == optimizer]
    plain = [other for other in plain if not kept_otherwise(runs.runs[other][0])]
    if gap is None or not gap.passed or len(plain) != 1 or group(runs, name) != "mole":
        return None
    losses = [final_losses(runs, each) for each in (name, plain[0], frozen)]
    seeds = set.intersection(*map(set, losses))
    if not seeds:
        return None
    loss, dense, without = (float(np.mean([each[seed] for seed in seeds])) for each in losses)
    return (without - loss) / (without - dense)


# ---------------------------------------------------------------- captured energy over depth and time


def energy(runs: RunSet) -> pd.DataFrame:
    """One row per variant, seed, step and layer in which a factored gradient told how much of the gradient it captures."""
    rows = [
        {"variant": name, "seed": seed, "step": line["step"], "layer": line["layer"], "energy": line["energy_capture"]}
        for (name, seed), lines in runs.curves.items()
        for line in lines
        if line["split"] == "mole" and (runs.runs[name][0].config.mole or {}).get("gradient") == "factored"
        if line.get("energy_capture") is not None
    ]
    return pd.DataFrame(rows, columns=["variant", "seed", "step", "layer", "energy"])


def draw_energy(runs: RunSet, look: Looks) -> Figure:
    """Left: each variant over time. Right: one variant over depth and time."""
    frame = energy(runs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(common.TEXT_WIDTH, 3.2), width_ratios=(1, 1.35))
    left.set(xlabel="step", ylabel="captured energy", ylim=(0, 1.02))
    if not len(frame):
        return figure
    for name, part in frame.groupby("variant"):
        mean = part.groupby("step")["energy"].agg(["mean", "min", "max"])
        left.plot(mean.index, mean["mean"], label=runs.runs[str(name)][0].label, **look[str(name)])
        left.fill_between(mean.index, mean["min"], mean["max"], color=look[str(name)]["color"], alpha=0.12, linewidth=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    chosen = str(frame["variant"].iloc[0])
    grid = frame[frame["variant"] == chosen].pivot_table(index="layer", columns="step", values="energy", sort=False)
    image = right.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="cividis")
    right.set_yticks(range(len(grid)), [str(layer) for layer in grid.index], fontsize=6)
    right.set_xticks(range(grid.shape[1]), [str(step) for step in grid.columns], rotation=90, fontsize=6)
    right.set(xlabel="step", title=runs.runs[chosen][0].label)
    right.grid(visible=False)
    figure.colorbar(image, ax=right, label="captured energy")
    return figure


# ---------------------------------------------------------------- memory against context length


def lengths(runs: RunSet) -> pd.DataFrame:
    """One row per method and context length: bytes kept, the peak, seconds a step; those that ran out of memory are left out."""
    rows = [
        {"variant": name, **entry.model_dump()}
        for name, records in runs.runs.items()
        for entry in records[0].contexts
        if entry.peak is not None
    ]
    return pd.DataFrame(rows)


def is_measured(runs: RunSet) -> bool:
    """Whether the peaks are a device's own, or sums over the ledger's categories."""
    return all(run.hardware.device == "cuda" for run in runs.every())


def draw_contexts(runs: RunSet) -> Figure:
    """Left: bytes kept for the backward pass. Right: the peak, with the longest context under the cap."""
    frame, look = lengths(runs), common.looks(runs.runs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(common.TEXT_WIDTH, 3.1))
    for name, part in frame.groupby("variant", sort=False):
        label = runs.runs[str(name)][0].label
        left.plot(part["tokens"], part["saved_activations"] / MIB, label=label, **look[str(name)])
        right.plot(part["tokens"], part["peak"] / MIB, **look[str(name)])
    for name, records in runs.runs.items():
        cap, longest = records[0].memory_cap, records[0].longest_context
        if cap and longest:
            right.axhline(cap / MIB, color="#9a9a9a", linewidth=0.8, linestyle="--", zorder=0)
            right.plot([longest], [cap / MIB], **{**look[name], "linestyle": "none", "markersize": 7, "fillstyle": "none"})
    peak = "peak on the device (MiB)" if is_measured(runs) else "sum of the ledger (MiB)"
    for axis, label in ((left, "kept for the backward pass (MiB)"), (right, peak)):
        axis.set(xscale="log", yscale="log", xlabel="context length (tokens)", ylabel=label)
        tokens = sorted(set(frame["tokens"]))
        axis.set_xticks(tokens, [f"{count:,d}".replace(",", " ") for count in tokens])
        axis.tick_params(axis="x", which="minor", labelbottom=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# ---------------------------------------------------------------- numbers for the paper


def report(runs: RunSet, source: RunSet, contexts: RunSet, prefix: str, numbers: Numbers) -> None:
    """What the paper says beside ``report.report``, under ``prefix``; the captured energy is that of ``source``."""

    def add(key: str, value: Any, format: str = "text", tier: str = runs.tier, **more: Any) -> None:
        numbers.add(f"{prefix}.{key}", value, format, tier=tier, **more)

    rows, dense = table(runs), controls(runs)[0]
    for name, row in rows.iterrows():
        fields = runs.runs[str(name)][0].config.mole or {}
        add(f"{name}.store", fields.get("store", "int4") if group(runs, str(name)) == "mole" else None)
        add(f"{name}.gradient", fields.get("gradient", "formed") if group(runs, str(name)) == "mole" else None)
        add(f"{name}.own", own_share(runs, str(name)), ".3f")
        add(f"{name}.bpb_ratio", row["bits_per_byte"] / rows.loc[dense, "bits_per_byte"] - 1 if dense else None, "+.2%")
    chosen = headline(runs)
    text = runs.runs[chosen][0].sample if chosen else None
    add("sample", excerpt(text or "") or None)
    frame = energy(source)
    add("energy.tier_label", source.label, tier=source.tier)
    add("energy.count", len(frame), "d")
    add("energy.median", float(frame["energy"].median()) if len(frame) else None, ".0%")
    add("energy.lowest", float(frame["energy"].min()) if len(frame) else None, ".0%")
    _report_contexts(contexts, add)


def _report_contexts(runs: RunSet, add: Any) -> None:
    frame = lengths(runs)
    add("contexts.tier_label", runs.label, tier=runs.tier)
    add("contexts.machine", runs.common(lambda run: f"{run.hardware.gpu or run.hardware.cpu}, {run.hardware.cores} cores"), tier=runs.tier)
    add("contexts.measured", is_measured(runs), "bool", tier=runs.tier)
    add("contexts.depth", runs.every()[0].config.model.depth, "d", tier=runs.tier)
    add("contexts.methods", list(runs.runs), "list", tier=runs.tier)
    longest = int(frame.groupby("variant")["tokens"].max().min())
    add("contexts.tokens", longest, ",d", tier=runs.tier)
    at = frame[frame["tokens"] == longest].set_index("variant")
    cap = runs.every()[0].memory_cap
    add("contexts.cap", cap / (1 << 30) if cap else None, ".3g", unit="GiB", tier=runs.tier)
    for name, records in runs.runs.items():
        row = at.loc[name]
        add(f"contexts.{name}.label", records[0].label, tier=runs.tier)
        add(f"contexts.{name}.kept", row["saved_activations"] / at.loc["dense", "saved_activations"], ".0%", tier=runs.tier)
        add(f"contexts.{name}.mib", row["saved_activations"] / MIB, ".1f", tier=runs.tier)
        add(f"contexts.{name}.peak", row["peak"] / MIB, ".1f", tier=runs.tier)
        paired = _ratio(row["step_seconds"], at.loc["dense", "step_seconds"])
        add(f"contexts.{name}.time", paired, ".2f", tier=runs.tier)
        add(f"contexts.{name}.longest", records[0].longest_context, ",d", tier=runs.tier)
        add(f"contexts.{name}.gain", _ratio(records[0].longest_context, runs.runs["dense"][0].longest_context), ".2f", tier=runs.tier)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return float(value / reference) if value and reference and np.isfinite([value, reference]).all() else None


def excerpt(text: str, length: int = 160) -> str:
    """The start of a text that a model wrote, as the paper can print it: a dot for each character outside ASCII's printable ones (a young
    model writes bytes that are no text), and one question mark for several (two are LaTeX's sign of a missing reference)."""
    dotted = "".join(character if " " <= character <= "~" else "\u00b7" for character in " ".join(text.split()))
    return re.sub(r"\?{2,}", "?", dotted)[:length]


def shown(runs: RunSet) -> Sequence[str]:
    """Texts that the trained models wrote, the headline's first."""
    names = sorted(runs.runs, key=lambda name: (name != headline(runs), name))
    return [f"{runs.runs[name][0].label}: {runs.runs[name][0].sample!r}" for name in names if runs.runs[name][0].sample]

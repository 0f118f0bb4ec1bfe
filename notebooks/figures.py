"""Figures of one experiment, for any task: curves, fronts, recovered gaps, certificates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any

import common
import numpy as np
import pandas as pd
from common import RunSet
from experiment import METRICS, contraction, controls, final_losses, group, headline, metric, ordered, share, spread, table, task
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Looks = Mapping[str, dict[str, Any]]


def looks(*sets: RunSet) -> Looks:
    """One look for each variant in all figures of a notebook; the headline's line is thicker."""
    look = common.looks(dict.fromkeys(name for runs in sets for name in ordered(runs)))
    for name in {headline(runs) for runs in sets} - {None}:
        look[name] |= {"linewidth": 2.0}
    return look


def curve(runs: RunSet, name: str, split: str, field: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean over seeds and standard deviation; the steps that all seeds logged."""
    series = []
    for run in runs.runs[name]:
        lines = [line for line in runs.curves[name, run.seed] if line["split"] == split and line.get(field) is not None]
        series.append(pd.Series({line["step"]: line[field] for line in lines}, dtype=float))
    frame = pd.concat(series, axis=1).dropna()
    return frame.index.to_numpy(), frame.mean(axis=1).to_numpy(), frame.std(axis=1).fillna(0.0).to_numpy()


def draw_curves(runs: RunSet, look: Looks) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(common.TEXT_WIDTH, 3.1))
    for axis, field, label in ((axes[0], "loss", "test loss"), (axes[1], metric(runs), METRICS[metric(runs)][0])):
        for name in ordered(runs):
            steps, mean, deviation = curve(runs, name, "test", field)
            axis.plot(steps, mean, label=runs.runs[name][0].label, **look[name])
            axis.fill_between(steps, mean - deviation, mean + deviation, color=look[name]["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel="step", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=3.2)
    return figure


def data_title(runs: RunSet) -> str:
    """What the runs were trained on, in lines that fit over half a page."""
    return fill(runs.common(lambda run: run.data.title), 24)


def front(points: Iterable[tuple[float, float]]) -> np.ndarray:
    """The points (state, score) that no other beats in both, by rising state; a higher score is better."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return np.array(kept)


def draw_front(axis: Axes, runs: RunSet, field: str, label: str, look: Looks) -> None:
    """One panel: a field of the table against state, the methods that train everything; frozen is named below them."""
    rows, (_, frozen) = table(runs), controls(runs)
    compared = rows.drop(index=[frozen] if frozen else [])
    sign = -1.0 if field in ("loss", "bits_per_byte") else 1.0
    for name, row in compared.iterrows():
        marker = {**look[str(name)], "linestyle": "none", "markersize": 5, "capsize": 2, "elinewidth": 0.7}
        axis.errorbar(row["state"], row[field], yerr=row[f"{field}_std"] or 0.0, label=row["label"], **marker)
    edge = front((x, sign * y) for x, y in zip(compared["state"], compared[field], strict=True))
    axis.step(edge[:, 0], sign * edge[:, 1], where="post", color="#9a9a9a", linewidth=0.8, linestyle="-", marker="none", zorder=0)
    below = f"\nfrozen: {abs(rows.loc[frozen, field]):.2f}" if frozen else ""
    axis.set(xscale="log", xlabel=f"optimizer state (bytes per parameter){below}", ylabel=label)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # a panel of less than a decade would have no label, or ten
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def draw_recovered(runs: RunSet, look: Looks) -> Figure:
    """Each seed as a small dot. Without a verdict the final losses are shown instead."""
    rows, gap = table(runs), task(runs)
    verdict = gap is not None and gap.passed
    names = list(rows.index)[::-1]
    figure, axis = plt.subplots(figsize=(common.TEXT_WIDTH, 0.6 + 0.23 * len(names)))
    for height, name in enumerate(names):
        values = list((share(runs, name).per_seed if verdict else final_losses(runs, name)).values())
        marker = {**look[name], "linestyle": "none"}
        axis.plot(values, [height] * len(values), ".", color="#8a8a8a", markersize=3, zorder=1)
        axis.errorbar(np.mean(values), height, xerr=spread(values) or 0.0, capsize=2, elinewidth=0.8, markersize=5, zorder=2, **marker)
    axis.set_yticks(range(len(names)), [rows.loc[name, "label"] for name in names])
    axis.grid(axis="y", visible=False)
    if verdict:
        for value in (0.0, 1.0):
            axis.axvline(value, color="black", linewidth=0.6, linestyle="--", zorder=0)
        axis.set_xlabel("recovered gap (0: frozen, 1: dense)")
    else:
        axis.set_xlabel("final test loss (no verdict on the gap in this tier)")
    return figure


def draw_ablation(sets: Sequence[RunSet], look: Looks) -> Figure:
    """A panel for each task, a row for each cell: its final loss, with the bytes of state per parameter beside it; controls as lines."""
    names = [name for name in ordered(sets[0]) if group(sets[0], name) == "mango"][::-1]
    figure, axes = plt.subplots(1, len(sets), figsize=(common.TEXT_WIDTH, 0.9 + 0.23 * len(names)), sharey=True, squeeze=False)
    for axis, runs in zip(axes[0], sets, strict=True):
        rows = table(runs)
        for height, name in enumerate(names):
            axis.plot(rows.loc[name, "loss"], height, **{**look[name], "linestyle": "none", "markersize": 5})
            place = {"textcoords": "offset points", "xytext": (5, -2.5), "fontsize": 6.5}
            axis.annotate(f"{rows.loc[name, 'state']:.2f}", (rows.loc[name, "loss"], height), **place)
        for name, dash in zip(controls(runs), ("--", ":"), strict=True):
            if name is not None:
                axis.axvline(rows.loc[name, "loss"], color="black", linewidth=0.6, linestyle=dash, label=rows.loc[name, "label"], zorder=0)
        axis.set(xlabel="final test loss", title=data_title(runs))
        axis.margins(x=0.15)
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(names)), [table(sets[0]).loc[name, "label"] for name in names])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def draw_contraction(runs: RunSet, look: Looks) -> Figure:
    frame = contraction(runs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(common.TEXT_WIDTH, 2.7))
    chosen = headline(runs) or (frame["variant"].iloc[0] if len(frame) else None)
    part = frame[frame["variant"] == chosen].groupby("step")
    for field, color, dash in (("measured", common.INK[1], "-"), ("certified", common.INK[2], "--")):
        middle, low, high = part[field].median(), part[field].min(), part[field].max()
        left.plot(middle.index, middle, color=color, linestyle=dash, marker="o" if field == "measured" else "s", label=field)
        left.fill_between(middle.index, low, high, color=color, alpha=0.15, linewidth=0, hatch=None if field == "measured" else "////")
    left.set(xlabel="step", ylabel="share of squared norm kept", ylim=(0, 1.02), title=runs.runs[chosen][0].label if chosen else "")
    left.legend(loc="best")
    for name, points in frame.groupby("variant"):
        marker = {**look[str(name)], "linestyle": "none"}
        right.plot(points["certified"], points["measured"], label=runs.runs[str(name)][0].label, markersize=2.5, alpha=0.5, **marker)
    positive = frame[["certified", "measured"]].to_numpy(dtype=float)
    low = positive[positive > 0].min(initial=0.5)
    right.plot([low, 1], [low, 1], color="black", linewidth=0.7, linestyle="-", marker="none")
    right.set(xscale="log", yscale="log", xlabel="certified share", ylabel="measured share")
    right.legend(loc="lower right", handletextpad=0.1)
    return figure

"""What every notebook shares: where the records lie, how figures look, and how numbers reach the paper.

A notebook reads ``results/``, draws, and leaves ``*.pdf``, ``*.png`` and ``numbers.json`` in one folder. The paper reads nothing else.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.figure import Figure

from mango.training import config
from mango.training.provenance import git
from mango.training.record import RunRecord, load

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT_WIDTH = 6.3  # inches: \textwidth of the paper, so that figures are printed at their own size
TIERS = ("smoke", "laptop", "long", "gpu")  # weakest first


# ---------------------------------------------------------------- where things are


def locate(results: str | Path) -> Path:
    """The results folder: seen from the working directory (papermill), or else from the repository's root (Jupyter's is notebooks/)."""
    path = Path(results)
    return path.resolve() if path.is_absolute() or path.is_dir() else REPOSITORY / path


def folder(out: str, results: Path, tier: str, notebook: str) -> Path:
    """Where the figures go: ``out``, relative to the parent of the results folder; when empty, ``<results>/<tier>/figures/<notebook>``."""
    path = results.parent / out if out else results / tier / "figures" / notebook
    path.mkdir(parents=True, exist_ok=True)
    return path


def commit() -> str:
    """Short hash of the checkout that draws, with a mark when tracked files differ from it."""
    state = git()
    return "outside a repository" if state["commit"] is None else state["commit"][:10] + ("+changes" if state["dirty"] else "")


# ---------------------------------------------------------------- run records


@dataclass(frozen=True)
class RunSet:
    """All runs of one experiment that were made together: one tier, on this machine or from one archive.

    Attributes:
        tier: the tier the records name.
        archive: name of the archive, or "" when the runs were made live.
        runs: variant -> its run records, in order of their seeds.
        curves: (variant, seed) -> the lines of metrics.jsonl.
    """

    tier: str
    archive: str
    runs: Mapping[str, Sequence[RunRecord]]
    curves: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]] = field(repr=False)

    @property
    def label(self) -> str:
        return f"archived {self.tier} ({self.archive})" if self.archive else f"live {self.tier}"

    def every(self) -> list[RunRecord]:
        return [run for runs in self.runs.values() for run in runs]

    def common(self, get: Callable[[RunRecord], Any]) -> str:
        """A property that the runs should share, or all its values joined."""
        return "; ".join(sorted({str(get(run)) for run in self.every()}))


def run_sets(results: Path, tier: str, experiment: str) -> list[RunSet]:
    """The sets that hold records of an experiment, best first: higher tiers before lower, then newer archives before older, live runs last.

    Raises: FileNotFoundError when there is not one record.
    """
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted((results / tier / experiment).glob("*/*/run.json")):
        found["", tier].append(path)
    for path in sorted((results / "archive").glob(f"*/**/{experiment}/*/*/run.json")):
        archive = path.relative_to(results / "archive").parts[0]
        found[archive, json.loads(path.read_text())["tier"]].append(path)
    if not found:
        raise FileNotFoundError(f"no run record of {experiment!r} under {results / tier / experiment}")
    rank = {name: place for place, name in enumerate(TIERS)}
    order = sorted(found, key=lambda key: (rank.get(key[1], -1), key[0][-7:]), reverse=True)  # an archive's name ends in yyyy-mm
    return [_read(paths=found[key], archive=key[0], tier=key[1]) for key in order]


def _read(paths: Sequence[Path], archive: str, tier: str) -> RunSet:
    runs: dict[str, list[RunRecord]] = defaultdict(list)
    curves = {}
    for path in paths:
        run = load(path)
        runs[run.variant].append(run)
        curves[run.variant, run.seed] = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines() if line]
    return RunSet(tier, archive, {name: sorted(group, key=lambda run: run.seed) for name, group in runs.items()}, curves)


def grids(tier: str, experiment: str) -> dict[str, Mapping[str, Sequence[Any]]]:
    """What was tried for each option of each variant, as the tier's settings record it; nothing for a tier without a file of its name."""
    path = REPOSITORY / "workflow" / "config" / f"{tier}.yaml"
    experiments = config.load(path).experiments if path.is_file() else {}
    return {name: variant.grid for name, variant in experiments[experiment].variants.items()} if experiment in experiments else {}


# ---------------------------------------------------------------- numbers for the paper


class Numbers:
    """Named values with the format they are printed in; written as one flat JSON object.

    ``numbers.add("cifar10.adamw.accuracy", 0.7012, ".1%")``. A format is a Python format specification or "text"; None stands for a value
    that is not defined (the paper then prints a dash).
    """

    def __init__(self, tier: str, source: str) -> None:
        self.tier, self.source = tier, source
        self.values: dict[str, dict[str, Any]] = {}

    def add(self, key: str, value: Any, format: str = "text", *, unit: str | None = None, tier: str | None = None) -> None:
        if key in self.values:
            raise KeyError(f"{key} is given twice")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} = {value} is not finite: give None when it is not defined")
        if hasattr(value, "item"):
            value = value.item()
        entry = {"value": value, "format": format, "tier": tier or self.tier, "source": self.source}
        self.values[key] = entry | ({"unit": unit} if unit else {})

    def write(self, out: Path) -> Path:
        path = out / "numbers.json"
        path.write_text(json.dumps(self.values, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        return path


# ---------------------------------------------------------------- figures

# Colours of clearly different lightness, each always paired with the same dash and marker: a grey print stays readable.
INK = ("#000000", "#0b4f8a", "#c8501e", "#3a9188", "#8d5aa5", "#d9a441", "#7f7f7f", "#5b2333", "#6fa8dc", "#a9b665", "#b0708c", "#404a5a")
DASHES = ((5, 1), (3, 1, 1, 1), (1, 1), (7, 2), (4, 1, 1, 1, 1, 1), (2, 2), (6, 1, 2, 1), (9, 2))  # points on and off
DASH = ("-", "--", "-.", ":", *((0, dashes) for dashes in DASHES))
MARK = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")


def style() -> None:
    """Computer Modern as in the paper, hairline axes, text in the PDF as text."""
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns, at every figure, of the age of Computer Modern
    matplotlib.rcdefaults()
    plt.rcParams.update(
        {
            "font.family": "cmr10",
            "mathtext.fontset": "cm",
            "axes.formatter.use_mathtext": True,
            "axes.unicode_minus": False,
            "font.size": 9,
            "axes.labelsize": 9,
            "axes.titlesize": 9,
            "legend.fontsize": 7.5,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "axes.linewidth": 0.5,
            "xtick.major.width": 0.5,
            "ytick.major.width": 0.5,
            "xtick.minor.width": 0.35,
            "ytick.minor.width": 0.35,
            "lines.linewidth": 1.1,
            "lines.markersize": 3.5,
            "patch.linewidth": 0.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.linewidth": 0.3,
            "grid.color": "#d0d0d0",
            "legend.frameon": False,
            "axes.prop_cycle": cycler(color=INK, linestyle=DASH, marker=MARK),
            "figure.constrained_layout.use": True,
            "figure.dpi": 120,
            "savefig.dpi": 200,
            "pdf.fonttype": 42,
        }
    )


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A fixed colour, dash and marker for each name, by position: the same in every figure of a notebook."""
    looks = [{"color": ink, "linestyle": dash, "marker": mark} for ink, dash, mark in zip(INK, DASH, MARK, strict=True)]
    return {name: dict(looks[place % len(looks)]) for place, name in enumerate(names)}


def save(figure: Figure, out: Path, name: str) -> None:
    """``<name>.pdf`` and ``<name>.png``; the bytes depend on the data alone, as no date or version is written into them."""
    figure.savefig(out / f"{name}.pdf", metadata={"Creator": None, "Producer": None, "CreationDate": None})
    figure.savefig(out / f"{name}.png", metadata={"Software": None})

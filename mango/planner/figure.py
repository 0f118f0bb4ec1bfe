"""The planner's figure: one bar a method, its categories stacked, the peak marked, the card's limit drawn."""

from __future__ import annotations

from pathlib import Path

from mango.compat import require
from mango.errors import ConfigError
from mango.planner.report import Report

GIB = 1 << 30
CATEGORIES = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "optimizer state",
    "activations": "saved activations",
    "workspace": "workspace",
}
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#b3b3b3")
FORMATS = (".pdf", ".png", ".svg")


def check(path: Path) -> None:
    """Raises: ConfigError for a file that no figure can be written to."""
    if path.suffix not in FORMATS:
        raise ConfigError.of("figure", str(path), "a file that ends in " + ", ".join(FORMATS))
    if not path.parent.is_dir():
        raise ConfigError.of("figure", str(path), "a file in a folder that exists")


def draw(report: Report, path: Path) -> None:
    """Write the figure. Raises: MissingExtra without matplotlib; ConfigError as ``check``."""
    check(path)
    require("matplotlib", extra="notebooks", purpose="the planner's figure")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.32 * len(report.rows)), layout="constrained")
    axes = figure.subplots()
    names = [row.method for row in report.rows]
    left = [0.0] * len(names)
    for (field, label), colour in zip(CATEGORIES.items(), COLOURS, strict=True):
        widths = [getattr(row, field) / GIB for row in report.rows]
        axes.barh(names, widths, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([row.peak / GIB for row in report.rows], names, "k|", markersize=12, markeredgewidth=2, label="peak")
    axes.axvline(report.usable / GIB, color="#c44e52", linestyle="--", label=f"{report.gpu}, usable")
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    inputs = f"{report.batch} x {report.seq} tokens" if report.axis == "sequence" else f"{report.batch} images"
    axes.set_title(f"{report.model}, {inputs}, {report.dtype} (computed)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)

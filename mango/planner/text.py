"""The planner's report for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mango.planner.report import Report, Row

GIB = 1 << 30


def text(report: Report, table: Callable[[Sequence[dict[str, Any]]], str]) -> str:
    """Title, table in GiB, and the plans that Mango would use; ``table`` sets rows."""
    what, unit = ("longest context", "tokens") if report.axis == "sequence" else ("largest batch", "images")
    inputs = (
        f"{report.batch} x {report.seq} tokens" if report.axis == "sequence" else f"{report.batch} images of {report.seq} x {report.seq}"
    )
    lines = [
        f"{report.model}, {report.parameters:,} parameters, {inputs}, {report.dtype}",
        f"{report.gpu}: {report.usable / GIB:.2f} GiB usable of {report.total / GIB:.2f} ({report.source}); GiB by category, computed",
        "",
        table([_cells(row, what) for row in report.rows]),
        "",
        "each category at its own maximum; peak: the most alive at one time; +fused and mango-budget step in the backward pass;",
        "+int4 and +int2, asked for by --method, keep codes of linear layers' inputs (mango.mole), -hidden nothing of hidden layers",
    ]
    for row in report.rows:
        if row.method == "mango-budget" and row.plans:
            lines += ["", f"mango-budget, {inputs}:" + ("" if row.fits else " does not fit; the smallest plans"), _plans(row.plans, table)]
            if row.longest_plans:
                lines += ["", f"mango-budget, {what} of {row.longest:,} {unit}:", _plans(row.longest_plans, table)]
    return "\n".join(lines)


def _cells(row: Row, longest: str) -> dict[str, str]:
    sizes = {"weights": row.weights, "gradients": row.gradients, "state": row.state, "activations": row.activations}
    sizes |= {"workspace": row.workspace, "peak": row.peak}
    cells = {"method": row.method} | {name: f"{value / GIB:.2f}" for name, value in sizes.items()}
    return cells | {"fits": "yes" if row.fits else "no", longest: f"{row.longest:,}" if row.longest else "none"}


def _plans(plans: Sequence[dict[str, Any]], table: Callable[[Sequence[dict[str, Any]]], str]) -> str:
    return table(
        [
            {
                "layers": entry["layers"],
                "shape": " x ".join(map(str, entry["shape"])),
                **{key: entry["plan"][key] for key in ("rank", "scouts", "basis_codec", "moment_codec", "error")},
                "first": entry["first"],
            }
            for entry in plans
        ]
    )

"""The planner's table and its sentences: computed bytes of a model that was not trained, on several cards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_numbers import escape

from mango.planner.methods import CHUNK

Report = Mapping[str, Any]
GIB = 1 << 30
LABELS = {
    "adamw-fp32": "AdamW, single precision",
    "adamw": "AdamW",
    "adamw8bit": "AdamW 8-bit",
    "adafactor": "Adafactor",
    "muon": "Muon",
    "galore": "GaLore",
    "galore8bit": "GaLore 8-bit",
    "mango": "Mango",
    "adamw8bit+fused": "AdamW 8-bit, stepping in the backward pass",
    "galore+fused": "GaLore, stepping in the backward pass",
    "galore8bit+fused": "GaLore 8-bit, stepping in the backward pass",
    "mango+fused": "Mango, stepping in the backward pass",
    "mango+fused+int4": "Mango, the same, inputs of linear layers as int4",
    "mango+fused+int2": "Mango, the same, inputs of linear layers as int2",
    "mango+fused+int2-hidden": "Mango, the same, hidden layers computed again",
    "mango-budget": "Mango, stepping in the backward pass, with plans chosen for the card",
}
LONGER = 3  # times dense training's context on the same card: the aim set before any figure
CATEGORIES = ("weights", "gradients", "state", "activations", "workspace", "peak")
DTYPES = {"bf16": "bfloat16", "fp16": "half precision", "fp32": "single precision"}


def read(folder: Path, model: str) -> list[Report]:
    """A model's report for every card, the smallest card first. Raises: ValueError when there is none, or they are not of one case."""
    reports = sorted((json.loads(path.read_text()) for path in folder.glob(f"{model}-*.json")), key=lambda report: report["total"])
    if not reports:
        raise ValueError(f"no plan of {model} under {folder}: run the rule plan first")
    for field in ("model", "seq", "batch", "dtype"):
        if len({report[field] for report in reports}) > 1:
            raise ValueError(f"the plans under {folder} differ in {field}")
    return reports


def sentences(reports: Sequence[Report], contexts: Report) -> dict[str, str]:
    """Of what fits on cards, and of how long a context of a converted nanochat does."""
    return {
        "plan.setup": setup(reports[0]),
        "plan.outcome": " ".join(outcome(report) for report in reports),
        "plan.contexts.setup": setup(contexts),
        "plan.contexts": longest(contexts),
    }


def longest(report: Report) -> str:
    """How much longer a context is than plain AdamW's, by method."""
    rows = {row["method"]: row["longest"] for row in report["rows"]}
    dense = rows.pop("adamw")
    others = " and ".join(rf"\num{{{value / dense:.2f}}} times as long ({LABELS[name]})" for name, value in rows.items())
    reached = max(rows.values()) >= LONGER * dense
    return (
        rf"On the {escape(report['gpu'])} the longest context of plain AdamW is {number(dense)} tokens; the others' are {others}. "
        rf"The aim set beforehand, \num{{{LONGER}}} times, is {'met' if reached else 'missed'}. "
        f"Converted layers work on {number(CHUNK['chunk'])} tokens at a time."
    )


def setup(report: Report) -> str:
    sequences = "one sequence" if report["batch"] == 1 else f"{number(report['batch'])} sequences"
    inputs = f"{sequences} of {number(report['seq'])} tokens"
    return (
        f"{escape(report['model'])}, {number(report['parameters'])} parameters, weights and gradients in {DTYPES[report['dtype']]}, "
        f"{inputs} in a forward pass, no activation checkpointing."
    )


def outcome(report: Report) -> str:
    """Who fits, and who fits the longest context."""
    rows = {row["method"]: row for row in report["rows"]}
    fitting = [name for name, row in rows.items() if row["fits"]]
    ours = [name for name in fitting if name.startswith("mango")]
    others = [name for name in fitting if name not in ours]
    card = rf"On the {escape(report['gpu'])} ({gib(report['usable'])}~GiB usable)"
    if not fitting:
        return f"{card} no method fits."
    best = max(fitting, key=lambda name: rows[name]["longest"])
    which = " and ".join(LABELS[name] for name in fitting) if len(fitting) < 3 else f"{number(len(fitting))} of the {number(len(rows))}"
    text = f"{card} {which} {'fits' if len(fitting) == 1 else 'fit'}"
    if ours and not others:
        text += ", and no other method does"
    return f"{text}; the longest context is {number(rows[best]['longest'])} tokens, by {LABELS[best]}."


def rows(reports: Sequence[Report]) -> list[list[str]]:
    """One row a method, with what fits on each card; what is chosen for a card has a row for that card alone."""
    table = []
    for place, row in enumerate(reports[0]["rows"]):
        own = [[report] for report in reports] if row["method"] == "mango-budget" else [reports]
        for cards in own:
            found = cards[0]["rows"][place]
            card = f" of {memory(cards[0])}" if row["method"] == "mango-budget" else ""
            cells = [LABELS[row["method"]] + card, *(gib(found[category]) for category in CATEGORIES)]
            for report in reports:
                longest = report["rows"][place]["longest"]
                fits = "yes" if report["rows"][place]["fits"] else "no"
                cells += [fits, number(longest) if longest else "none"] if report in cards else ["", ""]
            table.append(cells)
    return table


def head(reports: Sequence[Report]) -> tuple[str, list[str]]:
    """Column types and titles."""
    cards = [cell for report in reports for cell in (f"fits {memory(report)}", "context")]
    return "l" + " r" * (len(CATEGORIES) + len(cards)), ["", *("act." if name == "activations" else name for name in CATEGORIES), *cards]


def memory(report: Report) -> str:
    """ "24 GB" of "RTX 4090, 24 GB"."""
    return escape(report["gpu"].partition(",")[2].strip())


def gib(nbytes: int) -> str:
    return rf"\num{{{nbytes / GIB:.2f}}}"


def number(value: int) -> str:
    return rf"\num{{{value}}}"

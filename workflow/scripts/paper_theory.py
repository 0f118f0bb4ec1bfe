"""Theorem statements and machine-checked proof steps as LaTeX, exactly as theory/ states them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paper_numbers import escape

KEY = re.compile(r"\b[a-z]+[12][0-9]{3}[a-z0-9]+\b")  # a citation key: surname, year, word


def read(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The records that ``python -m theory --out`` wrote: id -> record, in the theorems' order."""
    records = [json.loads(path.read_text()) for path in folder.glob("T*.json")]
    return {record["id"]: record for record in sorted(records, key=lambda record: int(record["id"][1:]))}


def theorems(records: Mapping[str, Mapping[str, Any]]) -> str:
    """``theorems.tex``: one ``\\mangotheorem`` for each theorem of the registry; of those the tier did not run, the statement alone."""
    from theory import THEOREMS

    lines = []
    for name in THEOREMS:
        record = records.get(name)
        if record:
            title, where, statement = record["title"], record["source"], record["statement"]
            steps = "\n".join(rf"\proofstep{{{int(step['holds'])}}}{{{step['claim']}}}" for step in record["proof"])
        else:
            theorem = THEOREMS.load(name)
            title, where, statement = theorem.title, theorem.source, theorem.statement
            steps = rf"\item Not checked in this tier; \texttt{{python -m theory -{{}}-only {name}}} does."
        lines.append(f"\\mangotheorem{{{name}}}{{{escape(title)}}}{{{source(where)}}}{{{statement.strip()}}}{{{steps}}}\n")
    return "\n".join(lines)


def source(text: str) -> str:
    """A theorem's source with its citation keys cited."""
    parts, last = [], 0
    for match in KEY.finditer(text):
        parts += [_prose(text[last : match.start()]), rf"\citet{{{match.group(0)}}}"]
        last = match.end()
    return "".join([*parts, _prose(text[last:])])


def _prose(text: str) -> str:
    text = re.sub(r"\(arXiv:[^)]*\)", "", text)  # the bibliography gives it
    return re.sub(r"(?<=\d)-(?=\d)", "--", escape(text))

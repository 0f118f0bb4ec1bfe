"""Named values, and how each is printed in LaTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\u00d7": r"$\times$",
    "\u00b1": r"$\pm$",
    "\u2212": r"$-$",
    "\u2264": r"$\le$",
    "\u2265": r"$\ge$",
    "\u03b1": r"$\alpha$",
    "\u03c9": r"$\omega$",
    "\u03b3": r"$\gamma$",
    "\u03b4": r"$\delta$",
    "\u2013": "--",
    "\u2014": "---",
    "\u00b0": r"$^\circ$",
    "\u00b5": r"$\mu$",
    "\u00b7": r"\textperiodcentered{}",
    "\u2192": r"$\to$",
    "\u2218": r"$\circ$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def escape(text: object) -> str:
    """Plain text as LaTeX text."""
    return "".join(ESCAPES.get(character, character) for character in str(text))


def printed(value: Any, format: str, unit: str | None = None) -> str:
    """LaTeX for one value: a dash when it is not defined, siunitx's ``\\num`` for numbers, escaped text otherwise."""
    if value is None:
        return r"\undefinedvalue{}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(escape(item) for item in value)
    if format == "text":
        return escape(value)
    if format.endswith("%"):
        return rf"\num{{{format_number(100 * value, format[:-1] + 'f')}}}\,\%"
    number = rf"\num{{{format_number(value, format)}}}"
    return rf"{number}~{escape(unit)}" if unit else number


def format_number(value: float, format: str) -> str:
    """Python's formatting, without thousands separators (siunitx sets them), padded exponents or a negative zero."""
    text = re.sub(r"e([+-])0*(?=\d)", lambda sign: "e" + sign.group(1).strip("+"), f"{value:{format}}".replace(",", ""))
    return text[1:] if text.startswith("-") and not any(digit in "123456789" for digit in text.partition("e")[0]) else text


@dataclass
class Numbers:
    """All values of a tier: key -> {value, format, unit?, tier, source}."""

    values: dict[str, Mapping[str, Any]]

    @classmethod
    def read(cls, figures: Path) -> Numbers:
        """Merge every notebook's numbers.json.

        Raises: FileNotFoundError when there is none; ValueError when two notebooks give the same key.
        """
        paths = sorted(figures.glob("*/numbers.json"))
        if not paths:
            raise FileNotFoundError(f"no numbers.json under {figures}: run the notebooks first")
        values: dict[str, Mapping[str, Any]] = {}
        for path in paths:
            entries = json.loads(path.read_text())
            if twice := values.keys() & entries.keys():
                raise ValueError(f"{path} repeats {sorted(twice)[0]}, already given by another notebook")
            values |= entries
        return cls(values)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]["value"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.values[key]["value"] if key in self.values else default

    def latex(self, key: str) -> str:
        entry = self.values[key]
        return printed(entry["value"], entry["format"], entry.get("unit"))

    def bare(self, key: str) -> str:
        """Without its unit or percent sign, for table cells whose column head gives it."""
        entry = self.values[key]
        return printed(entry["value"], entry["format"]).removesuffix(r"\,\%")

    def variables(self) -> str:
        """``variables.tex``."""
        return "".join(f"\\mangodefine{{{key}}}{{{self.latex(key)}}}\n" for key in sorted(self.values))

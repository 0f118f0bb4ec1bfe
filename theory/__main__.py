"""``python -m theory [--json] [--only T1,T4] [--seed N] [--out DIR]``: prove, measure and control every theorem.

Prints one row each; exit code 1 when a row does not hold or a control does not violate its bound, 2 when the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mango.errors import ConfigError, DataError, MangoError
from theory import THEOREMS
from theory.runner import verify_all

COLUMNS = ("id", "title", "bound", "measured", "slack", "tight", "control_violated", "seconds")


def select(only: str | None) -> list[str]:
    """The theorems named by ``--only``, in the registry's order; all without it."""
    names = list(THEOREMS) if only is None else [name.strip().upper() for name in only.split(",")]
    for name in names:
        if name not in THEOREMS:
            raise ConfigError.of("--only", name, "theorems among " + ", ".join(THEOREMS))
    return [name for name in THEOREMS if name in names]


def write(record: dict[str, Any], folder: Path) -> None:
    """``folder/<id>.json``, atomically: a reader sees the old file or the whole new one."""
    partial = folder / f".{record['id']}.{os.getpid()}.partial"
    try:
        partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        partial.replace(folder / f"{record['id']}.json")
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unwritable(folder, error) from error


def prepare(folder: Path) -> None:
    """Creates the folder and tries it, before minutes of work would be lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"--out = {str(folder)!r} is not legal: a folder that can be written ({error.strerror})")


def row(record: dict[str, Any]) -> dict[str, Any]:
    """The record without its bulk, as ``--json`` prints it."""
    return {key: value for key, value in record.items() if key not in ("statement", "proof", "data")}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Fixed-width table, one line a theorem, with the failures below."""
    cells = [list(COLUMNS)]
    for record in records:
        numbers = [f"{record['bound']:.9g}", f"{record['measured']:.9g}", f"{record['slack']:.2e}"]
        verdicts = ["tight" if record["tight"] else "valid", "yes" if record["control_violated"] else "NO", f"{record['seconds']:.1f}"]
        cells.append([record["id"], record["title"], *numbers, *verdicts])
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines += [f"FAILED {record['id']}: {failure}" for record in records for failure in record["failures"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m theory", description="prove, measure and control every theorem")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--only", metavar="T1,T4", help="a comma-separated selection")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every measurement (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/<id>.json with statement, proof and data")
    options = parser.parse_args(arguments)
    try:
        if not 0 <= options.seed < 2**31:
            raise ConfigError.of("--seed", options.seed, "an integer from 0 to 2^31 - 1")
        names = select(options.only)
        if options.out is not None:
            prepare(options.out)
        records = verify_all(names, options.seed)
        if options.out is not None:
            for record in records:
                write(record, options.out)
    except MangoError as error:
        print(f"theory: {error}", file=sys.stderr)
        return 2
    print(json.dumps([row(record) for record in records], indent=1, allow_nan=False) if options.json else table(records))
    return 0 if all(record["holds"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compare a tier's live results with its committed reference values, each within its tolerance.

    python workflow/scripts/verify.py laptop              exit code 1 when a value is outside, 2 when there is nothing to compare
    python workflow/scripts/verify.py laptop --record     write the live values as the reference for the data they were made from

results/reference/<tier>.json holds, for each theorem, what was measured, and for each experiment one set of values per data fingerprint:
numbers made from the embedded stand-in are never compared with numbers made from CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What is compared, with the tolerance that is recorded at least: relative, absolute. Bytes are counted and must be equal.
COMPARED = {
    "accuracy": (0.0, 0.02),
    "bits_per_byte": (0.03, 0.0),
    "loss": (0.03, 0.0),
    "recovered": (0.0, 0.05),
    "gap": (0.1, 0.0),
    "state": (1e-9, 0.0),
}
SPREADS = 3.0  # and at least so many standard deviations over seeds, where there are several
THEORY = 0.05  # relative: searches and solvers differ a little between machines


def live(results: Path, tier: str) -> dict[str, Any]:
    """The tier's own values, in the reference's form, with the tolerances that would be recorded."""
    found: dict[str, Any] = {"theory": {}, "experiments": {}}
    for path in sorted((results / tier / "theory").glob("T*.json")):
        record = json.loads(path.read_text())
        found["theory"][record["id"]] = {"value": record["measured"], "tolerance": THEORY * abs(record["measured"])}
    for path in sorted((results / tier / "data").glob("*.json")):
        data = json.loads(path.read_text())
        values = dict(numbers(results / tier / "figures", path.stem))
        if values:
            found["experiments"][path.stem] = {data["fingerprint"]: {"data": data["title"], "values": values}}
    return found


def numbers(figures: Path, experiment: str) -> Iterator[tuple[str, dict[str, float]]]:
    """The compared numbers of an experiment's own runs (archived runs are not this machine's)."""
    prefix = f"{experiment}.live."
    for path in sorted(figures.glob("*/numbers.json")):
        values = {key: entry["value"] for key, entry in json.loads(path.read_text()).items() if key.startswith(prefix)}
        for key, value in values.items():
            relative, absolute = COMPARED.get(key.rpartition(".")[2], (None, None))
            if relative is not None and isinstance(value, int | float):
                spread = values.get(f"{key}_std")
                allowed = [relative * abs(value), absolute, SPREADS * (spread or 0.0)]
                if key.endswith(".recovered") and spread is None:  # of one run: as far as its loss may be off, of which it is a quotient
                    allowed.append(COMPARED["loss"][0] * values[f"{key.removesuffix('recovered')}loss"] / abs(values[f"{prefix}gap"]))
                yield key.removeprefix(prefix), {"value": value, "tolerance": max(allowed)}


def pairs(reference: dict[str, Any], mine: dict[str, Any]) -> Iterator[tuple[str, dict[str, float], float | None]]:
    """(name, reference entry, live value or None) of everything that the reference has for this theory and these data."""
    for name, entry in reference.get("theory", {}).items():
        yield name, entry, mine["theory"].get(name, {}).get("value")
    for experiment, versions in mine["experiments"].items():
        for fingerprint, own in versions.items():
            expected = reference.get("experiments", {}).get(experiment, {}).get(fingerprint, {"values": {}})
            for key, entry in expected["values"].items():
                yield f"{experiment}.{key}", entry, own["values"].get(key, {}).get("value")


def unmatched(reference: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """Live experiments whose data the reference does not know."""
    known = reference.get("experiments", {})
    return [
        f"{experiment}: no reference for {own['data']} with fingerprint {fingerprint[:12]}"
        for experiment, versions in mine["experiments"].items()
        for fingerprint, own in versions.items()
        if fingerprint not in known.get(experiment, {})
    ]


def record(reference: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """The reference with the live values in place of older ones for the same data."""
    experiments = {name: dict(versions) for name, versions in reference.get("experiments", {}).items()}
    for experiment, versions in mine["experiments"].items():
        experiments.setdefault(experiment, {}).update(versions)
    return {"theory": mine["theory"], "experiments": experiments}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tier")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--record", action="store_true", help="write the live values as the reference")
    options = parser.parse_args()
    path = options.results / "reference" / f"{options.tier}.json"
    reference = json.loads(path.read_text()) if path.is_file() else {}
    mine = live(options.results, options.tier)
    if not mine["theory"] and not mine["experiments"]:
        print(f"verify: {options.results / options.tier} holds no results: run the workflow first", file=sys.stderr)
        return 2
    if options.record:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record(reference, mine), indent=1, sort_keys=True) + "\n")
        return 0
    compared = list(pairs(reference, mine))
    outside = 0
    for name, entry, value in compared:
        good = value is not None and abs(value - entry["value"]) <= entry["tolerance"]
        outside += not good
        shown = "absent" if value is None else f"{value:.6g}"
        print(f"{'ok  ' if good else 'FAIL'} {name}: {shown}, reference {entry['value']:.6g} +- {entry['tolerance']:.2g}")
    for line in unmatched(reference, mine):
        print(line)
    print(f"{len(compared) - outside} of {len(compared)} values within their tolerances")
    return 1 if outside else 0 if compared else 2


if __name__ == "__main__":
    sys.exit(main())

"""Turn results into LaTeX: numbers, tables, sentences, theorem statements and figures of one tier.

    python workflow/scripts/paper_generate.py --tier laptop

reads     results/<tier>/figures/<notebook>/{numbers.json,*.pdf}, results/<tier>/{theory,plan}/*.json, paper/reported.json,
          and with --benchmarks DIR the Snakemake benchmark files (*.tsv) under it
writes    paper/generated/<tier>/{variables,theorems,claims,provenance}.tex, tables/*.tex, figures/<notebook>/*.pdf, numbers.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # theory/ is read from the checkout that holds this script

import paper_claims  # noqa: E402
import paper_plan  # noqa: E402
import paper_tables  # noqa: E402
import paper_theory  # noqa: E402
from paper_numbers import Numbers, escape  # noqa: E402


def provenance(numbers: Numbers, tier: str) -> str:
    """Macros that say what the build was made from."""
    live = numbers.get("cifar10.live.tier_label", tier)
    return f"\\newcommand{{\\papertier}}{{{escape(tier)}}}\n\\newcommand{{\\livelabel}}{{{escape(live)}}}\n"


def generate(tier: str, results: Path, out: Path, benchmarks: Path | None) -> None:
    """Write everything; what an earlier call left in the folder goes."""
    numbers = Numbers.read(results / tier / "figures")
    records = paper_theory.read(results / tier / "theory")
    plans = paper_plan.read(results / tier / "plan", "llama-7b")
    contexts = paper_plan.read(results / tier / "plan", "nanochat-d12")
    reported = json.loads((ROOT / "paper" / "reported.json").read_text())
    files: dict[str, str] = {
        "provenance.tex": provenance(numbers, tier),
        "theorems.tex": paper_theory.theorems(records),
        "claims.tex": paper_claims.sentences(numbers, records, plans, contexts, tier),
        **{
            f"tables/{name}.tex": text
            for name, text in paper_tables.tables(numbers, records, plans, contexts, reported, tier, seconds(benchmarks)).items()
        },
    }
    for stale in ("tables", "figures"):
        shutil.rmtree(out / stale, ignore_errors=True)
    for name, text in (files | {"variables.tex": numbers.variables()}).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    for figure in sorted((results / tier / "figures").glob("*/*.pdf")):
        target = out / "figures" / figure.parent.name / figure.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(figure, target)
    (out / "numbers.json").write_text(json.dumps(numbers.values, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def seconds(benchmarks: Path | None) -> Mapping[str, float]:
    """Wall seconds by benchmark file (its path under the folder, without suffix), from Snakemake's benchmark files."""
    found: dict[str, Any] = {}
    for path in sorted(benchmarks.rglob("*.tsv")) if benchmarks else []:
        header, *rows = [line.split("\t") for line in path.read_text().splitlines() if line]
        column = header.index("s")
        found[path.relative_to(benchmarks).with_suffix("").as_posix()] = float(rows[-1][column]) if rows else 0.0
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", default="laptop")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--benchmarks", type=Path, help="folder of Snakemake benchmark files")
    parser.add_argument("--out", type=Path, help="default: paper/generated/<tier>")
    options = parser.parse_args(arguments)
    try:
        generate(options.tier, options.results, options.out or ROOT / "paper" / "generated" / options.tier, options.benchmarks)
    except (OSError, ValueError, KeyError) as error:
        print(f"paper: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

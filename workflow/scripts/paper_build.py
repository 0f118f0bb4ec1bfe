"""Typeset the paper of one tier and refuse a PDF that is not fit to read.

    python workflow/scripts/paper_build.py --tier laptop        -> paper/build/mango.pdf
    python workflow/scripts/paper_build.py --tier smoke         -> paper/build/smoke/mango.pdf

Needs paper/generated/<tier>/ (paper_generate.py) and latexmk or tectonic. The bytes depend on the sources alone: no date, no path.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PAPER = Path(__file__).resolve().parents[2] / "paper"
OVERFULL = 1.0  # points that a line may stick out: less than the eye sees
TROUBLE = (
    (r"^LaTeX Warning: (Reference `[^']*' .* undefined)", "undefined reference"),
    (r"^LaTeX Warning: (Label `[^']*' multiply defined)", "label defined twice"),
    (r"^Package natbib Warning: (Citation `[^']*' .* undefined)", "undefined citation"),
    (r"^LaTeX Warning: (Float too large .*)", "figure or table too large"),
    (r"^LaTeX Font Warning: (Font shape .* undefined)", "missing font"),
    (r"^Missing character: (.*)", "missing character"),
)


class PaperError(Exception):
    """The paper cannot be built, or must not be shown; the message is the reason."""


def command(engine: str, source: Path, out: Path) -> list[str]:
    """The engine's call, run from paper/ so that sections/ and generated/ are found."""
    if engine == "latexmk":
        return ["latexmk", "-pdf", "-norc", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error", f"-outdir={out}", str(source)]
    return ["tectonic", "--keep-logs", "--keep-intermediates", "-Z", f"search-path={PAPER}", "--outdir", str(out), str(source)]


def build(tier: str, generated: Path, out: Path) -> Path:
    """Build ``out``/mango.pdf from ``generated``; everything LaTeX leaves behind stays in ``out``/<tier>.tex/."""
    if not (generated / "variables.tex").is_file():
        raise PaperError(f"{generated} has no variables.tex: run workflow/scripts/paper_generate.py --tier {tier} first")
    engine = next((name for name in ("latexmk", "tectonic") if shutil.which(name)), None)
    if engine is None:
        raise PaperError("neither latexmk nor tectonic is on PATH: make setup says how to get one")
    work = out / f"{tier}.tex"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "mango.tex").write_text(f"\\def\\generated{{{os.path.relpath(generated, PAPER)}}}\n\\input{{main.tex}}\n")
    environment = os.environ | {"SOURCE_DATE_EPOCH": "0", "FORCE_SOURCE_DATE": "1", "max_print_line": "1000"}
    arguments = command(engine, Path(os.path.relpath(work / "mango.tex", PAPER)), Path(os.path.relpath(work, PAPER)))
    result = subprocess.run(arguments, cwd=PAPER, env=environment, capture_output=True, text=True, errors="replace")
    log = work / "mango.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    if result.returncode:
        raise PaperError(first_error(text) or (result.stderr or result.stdout).strip()[-2000:])
    problems = inspect(text) + question_marks(work / "mango.pdf")
    if problems:
        raise PaperError("the PDF is not fit to read:\n  " + "\n  ".join(problems))
    pdf = out / "mango.pdf"
    shutil.copyfile(work / "mango.pdf", pdf)
    return pdf


def first_error(log: str) -> str:
    """What stopped LaTeX, with the file and line it names."""
    match = re.search(r"^(?:!|\S+:\d+:) .*(?:\n(?!\n).*){0,3}", log, re.MULTILINE)
    return match.group(0) if match else ""


def inspect(log: str) -> list[str]:
    """Everything in LaTeX's log that a reader would see."""
    found = [f"{kind}: {hit}" for pattern, kind in TROUBLE for hit in dict.fromkeys(re.findall(pattern, log, re.MULTILINE))]
    for kind, points, where in re.findall(r"^Overfull \\([hv])box \(([\d.]+)pt too (?:wide|high)\) ?(.*)", log, re.MULTILINE):
        if float(points) > OVERFULL:
            found.append(f"overfull {'line' if kind == 'h' else 'page'}: {points} pt {where}")
    return found


def question_marks(pdf: Path) -> list[str]:
    """``??`` in the typeset text (when poppler's pdftotext is there; an undefined reference is in the log as well)."""
    if not shutil.which("pdftotext"):
        return []
    text = subprocess.run(["pdftotext", str(pdf), "-"], capture_output=True, text=True, check=True).stdout
    return [f"?? in the text: {line.strip()}" for line in text.splitlines() if "??" in line]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", default="laptop")
    parser.add_argument("--generated", type=Path, help="default: paper/generated/<tier>")
    parser.add_argument("--out", type=Path, help="folder of mango.pdf; default: paper/build for laptop, paper/build/<tier> for other tiers")
    options = parser.parse_args(arguments)
    generated = (options.generated or PAPER / "generated" / options.tier).resolve()
    out = (options.out or PAPER / "build" / ("" if options.tier == "laptop" else options.tier)).resolve()
    try:
        print(os.path.relpath(build(options.tier, generated, out)))
    except PaperError as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

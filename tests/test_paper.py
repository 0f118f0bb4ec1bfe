"""The manuscript: no number typed by hand, every value, sentence and citation defined, a PDF that is refused when it is unfit."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ROOT, TIER, executed, tiny_results

from mango.planner import plan
from mango.training.config import load

PAPER = ROOT / "paper"
SOURCES = [PAPER / "main.tex", *sorted((PAPER / "sections").glob("*.tex"))]
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import paper_build  # noqa: E402
import paper_experiments  # noqa: E402
import paper_generate  # noqa: E402
import paper_numbers  # noqa: E402
import paper_theory  # noqa: E402

# What may hold digits in running text, and why.
NAMES = {
    "EF21": "a method",
    "CIFAR-10": "a data set",
    "C4": "a data set",
    "NF4": "a code",
    "bfloat16": "a number format",
    "top-1": "a compressor",
}
# Commands whose arguments are not read: keys, labels, files, and layout.
SILENT = (
    r"\\(?:label|ref|cref|Cref|eqref|cite[tp]?|input|val|sentence|printtheorem|printsteps|proofsection|theoremtitle|file|path|url|bibliography|bibliographystyle"
    r"|usepackage|documentclass|begin|end)\*?(?:\[[^\]]*\])*\{[^}]*\}(?:\[[^\]]*\])?"
    r"|\\mangofigure(?:\{[^{}]*\}){3}|\\mangotable(?:\{[^{}]*\}){2}|\\ifval\{[^}]*\}"
)
MATH = r"\\begin\{equation\}.*?\\end\{equation\}|\\\[.*?\\\]|(?<!\\)\$.*?(?<!\\)\$"


def source(path: Path) -> str:
    return re.sub(r"(?<!\\)%.*", "", path.read_text())


@functools.cache
def generated() -> Path:
    """What paper_generate writes from the notebooks' real, tiny runs."""
    for name in ("01_cifar10", "02_theory", "03_optimizer", "04_molegrad", "05_policy", "06_vision", "07_llama"):
        executed(name)
    folder = tiny_results() / TIER / "plan"
    folder.mkdir(exist_ok=True)
    for gpu in ("rtx4090", "rtx5090"):
        (folder / f"llama-7b-{gpu}.json").write_text(json.dumps(plan("llama-micro", gpu, seq=64).plain()))
    contexts = plan("d1", "rtx5090", seq=64, methods=["adamw", "mango+fused+int2"], reserve="28GiB")  # a context of thousands
    (folder / "nanochat-d12-rtx5090.json").write_text(json.dumps(contexts.plain()))
    out = tiny_results().parent / "generated"
    assert paper_generate.main(["--tier", TIER, "--results", str(tiny_results()), "--out", str(out)]) == 0
    return out


def used(command: str) -> Iterator[tuple[str, str]]:
    """(file, key) of every use of a macro, in the manuscript and in what is generated."""
    for path in [*SOURCES, *generated().rglob("*.tex")]:
        for key in re.findall(rf"\\{command}\{{([^}}#]*)\}}", source(path)):
            yield path.name, key


def defined(macro: str) -> set[str]:
    return {key for path in generated().glob("*.tex") for key in re.findall(rf"\\{macro}\{{([^}}]*)\}}", path.read_text())}


# ---------------------------------------------------------------- no number typed by hand


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_number_is_typed_by_hand(path: Path) -> None:
    """Text holds no digit outside names; formulas hold coefficients of at most two digits, never a decimal or a percentage."""
    text = source(path).partition(r"\begin{document}")[2] if path.name == "main.tex" else source(path)
    for formula in re.findall(MATH, text, flags=re.DOTALL):
        assert not re.search(r"\d\.\d|\d{3}|\d\s*\\%", re.sub(SILENT, " ", formula)), f"{path.name}: {formula}"
    prose = re.sub(SILENT, " ", re.sub(MATH, " ", text, flags=re.DOTALL), flags=re.DOTALL)
    for name in NAMES:
        prose = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w])", " ", prose)
    found = re.search(r".{0,40}\d.{0,40}", prose)
    assert found is None, f"{path.name}: {found.group(0)!r}: use \\val, or add the name to the list with its reason"


def test_the_search_for_typed_numbers_finds_them(tmp_path: Path) -> None:
    for text in ("recovers 0.93 of the gap", "in 12 runs", r"a share of $0.93$", r"about $93\%$", r"$r=512$", r"\val{a} of 7"):
        path = tmp_path / "x.tex"
        path.write_text(text)
        with pytest.raises(AssertionError):
            test_no_number_is_typed_by_hand(path)


# ---------------------------------------------------------------- keys


def test_every_value_is_defined() -> None:
    """Values of theorems that a tier does not run stand behind \\ifval."""
    known = defined("mangodefine")
    for name, key in used("val"):
        assert key in known, f"{name} uses {key}, which no notebook gives"


def test_every_sentence_is_defined_and_used() -> None:
    known = defined("mangosentence")
    wanted = {key for _, key in used("sentence")}
    assert wanted == known


def test_guards_name_values_that_some_tier_gives() -> None:
    keys = {key for path in SOURCES for key in re.findall(r"\\ifval\{([^}]*)\}", source(path))}
    assert keys
    from theory import THEOREMS

    tier = load(ROOT / "workflow/config/laptop.yaml")  # has every experiment, and each of them its number of runs
    given = {f"{name}.archived" for name in paper_experiments.EXPERIMENTS} | {f"{name}.runs" for name in tier.experiments}
    for key in keys - given:
        bound = re.fullmatch(r"theory\.(T\d)\.bound", key)
        assert key.split(".")[1] in THEOREMS if bound else key in defined("mangodefine"), key


def test_every_figure_and_table_is_generated() -> None:
    text = "".join(source(path) for path in SOURCES)
    for table in re.findall(r"\\mangotable\{[^}]*\}\{([^}]*)\}", text):
        assert (generated() / "tables" / f"{table}.tex").is_file(), table
    saved = "".join(path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb"))
    for notebook, figure in re.findall(r"\\mangofigure\{[^}]*\}\{([^}]*)\}\{([^}]*)\}", text):
        assert (ROOT / "notebooks" / f"{notebook}.ipynb").is_file()
        assert f'out, \\"{figure}\\")' in saved, figure


def test_theorem_statements_are_those_of_theory() -> None:
    from theory import THEOREMS

    text = (generated() / "theorems.tex").read_text()
    for name in THEOREMS:
        theorem = THEOREMS.load(name)
        assert theorem.statement.strip() in text
        assert f"\\printtheorem{{{name}}}" in source(PAPER / "sections" / "theory.tex")
        assert f"\\printsteps{{{name}}}" in source(PAPER / "sections" / "proofs.tex")
    steps = json.loads((tiny_results() / TIER / "theory" / "T3.json").read_text())["proof"]
    assert all(step["claim"] in text for step in steps)


# ---------------------------------------------------------------- citations


def entries() -> list[str]:
    return re.findall(r"^@\w+\{([^,]+),", (PAPER / "refs.bib").read_text(), re.MULTILINE)


def test_citations_exist() -> None:
    keys = entries()
    assert len(keys) == len(set(keys)), "an entry is given twice"
    for path in [*SOURCES, *generated().rglob("*.tex")]:
        for group in re.findall(r"\\cite[tp]?(?:\[[^\]]*\])*\{([^}#]*)\}", source(path)):
            for key in group.split(","):
                assert key.strip() in keys, f"{path.name} cites {key}"


def test_sources_of_theorems_are_in_the_bibliography() -> None:
    from theory import THEOREMS

    for name in THEOREMS:
        text = THEOREMS.load(name).source
        cited = paper_theory.KEY.findall(text)
        assert cited or "derived here" in text, f"{name}: {text!r} names no source"
        assert set(cited) <= set(entries()), f"{name}: {text!r}"


def test_every_entry_of_the_bibliography_is_cited_with_its_year() -> None:
    bib = (PAPER / "refs.bib").read_text()
    text = "".join(path.read_text() for path in [*SOURCES, *generated().rglob("*.tex")])
    for entry in re.findall(r"^@\w+\{.*?^\}", bib, re.MULTILINE | re.DOTALL):
        key = re.match(r"@\w+\{([^,]+)", entry).group(1)  # type: ignore[union-attr]
        assert re.search(r"year = \{\d{4}\}", entry), key
        assert key in text, f"{key} is never cited"


# ---------------------------------------------------------------- printed values


@pytest.mark.parametrize(
    ("value", "format", "latex"),
    [
        (0.8845101952, ".4f", r"\num{0.8845}"),
        (0.4871, ".1%", r"\num{48.7}\,\%"),
        (1234567, ",d", r"\num{1234567}"),
        (1.5e-7, ".1e", r"\num{1.5e-7}"),
        (3.6e8, ".4g", r"\num{3.6e8}"),
        (-0.0001, ".2f", r"\num{0.00}"),
        (-0.25, ".2f", r"\num{-0.25}"),
        (None, ".2f", r"\undefinedvalue{}"),
        (True, "bool", "yes"),
        ("100 % of x_1 & y", "text", r"100 \% of x\_1 \& y"),
        (["a_b", "c"], "list", r"a\_b, c"),
    ],
)
def test_values_are_printed(value: object, format: str, latex: str) -> None:
    assert paper_numbers.printed(value, format) == latex


def test_two_notebooks_may_not_give_the_same_key(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numbers.json").write_text('{"x": {"value": 1, "format": "d"}}')
    with pytest.raises(ValueError, match="repeats x"):
        paper_numbers.Numbers.read(tmp_path)


# ---------------------------------------------------------------- the PDF


def test_the_paper_builds_twice_to_the_same_bytes(tmp_path: Path) -> None:
    first = paper_build.build(TIER, generated(), tmp_path / "a")
    second = paper_build.build(TIER, generated(), tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"%PDF")


def test_a_missing_value_stops_the_build_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(generated(), tmp_path / "generated")
    variables = tmp_path / "generated" / "variables.tex"
    variables.write_text(re.sub(r"\\mangodefine\{wrong\.nf4\.worst\}.*\n", "", variables.read_text()))
    assert paper_build.main(["--tier", TIER, "--generated", str(tmp_path / "generated"), "--out", str(tmp_path / "build")]) == 2
    assert "no value for 'wrong.nf4.worst'" in capsys.readouterr().err
    assert not (tmp_path / "build" / "mango.pdf").exists()


def test_a_log_that_shows_trouble_is_refused() -> None:
    log = """
LaTeX Warning: Reference `fig:x' on page 1 undefined on input line 3.
Overfull \\hbox (12.3pt too wide) in paragraph at lines 4--5
Overfull \\hbox (0.4pt too wide) in paragraph at lines 7--8
Package natbib Warning: Citation `nobody' on page 2 undefined on input line 9.
LaTeX Warning: Float too large for page by 20.0pt on input line 30.
"""
    found = "\n".join(paper_build.inspect(log))
    for word in ("fig:x", "12.3 pt", "nobody", "Float too large"):
        assert word in found
    assert "0.4" not in found
    assert paper_build.inspect("This is fine.") == []


def test_generating_without_notebooks_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_generate.main(["--tier", "smoke", "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "run the notebooks first" in capsys.readouterr().err


def test_building_without_generated_files_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_build.main(["--tier", "smoke", "--generated", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "paper_generate.py --tier smoke first" in capsys.readouterr().err

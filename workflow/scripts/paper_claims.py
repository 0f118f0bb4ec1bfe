"""Sentences whose wording depends on the numbers: the text stays true whichever data, tier or outcome stands behind it.

Each function returns LaTeX in which numbers appear as ``\\val{key}``; nothing here formats one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import paper_llama
import paper_plan
import paper_policy
from paper_experiments import ABLATIONS, EXPERIMENTS, LLAMA, Photographs, Sentences, count, present, subjects
from paper_molegrad import Mole
from paper_numbers import Numbers

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Evidence:
    """One row of the table of claims; ``benchmark`` is a prefix of Snakemake's benchmark files, ``seconds`` what is known without them."""

    text: str
    rule: str
    file: str
    benchmark: str
    seconds: float | None
    guard: str


def sentences(
    numbers: Numbers, records: Records, plans: Sequence[paper_plan.Report], contexts: Sequence[paper_plan.Report], tier: str
) -> str:
    """``claims.tex``."""
    found = {
        "abstract.theory": theory(records),
        "theory.summary": theory(records),
        "theory.failures": failures(records),
        "limitations.scale": " ".join(Sentences(numbers, name).scale() for name in present(numbers)),
        "limitations.energy": energy(numbers),
        "reproducibility.compute": compute(numbers, records),
    } | paper_plan.sentences(plans, contexts[0])
    for name in EXPERIMENTS:
        kind = Mole if name == "nanochat" else Photographs if name.startswith("imagenet") else Sentences
        found |= kind(numbers, name).all()
    for name in ABLATIONS:
        found[f"{name}.cells"] = Sentences(numbers, name).cells() if f"{name}.runs" in numbers else "This tier has no ablation."
        found[f"{name}.caption"] = Sentences(numbers, name).caption() if f"{name}.runs" in numbers else ""
    found |= paper_policy.sentences(numbers) | paper_llama.sentences(numbers)
    return "".join(f"\\mangosentence{{{key}}}{{{text}}}\n" for key, text in found.items())


def energy(numbers: Numbers) -> str:
    """Of which runs it was measured, or why not: experiments of one answer share a sentence."""
    found: dict[str, list[str]] = {}
    for name in present(numbers):
        found.setdefault(numbers[f"{name}.energy"], []).append(name)
    answers = []
    for names in found.values():
        *others, last = [EXPERIMENTS[name].subject for name in names]
        runs = f"{'; '.join(others)}; and {last}" if others else last  # some have commas
        answers.append(f"Energy of the runs on {runs}: {Sentences(numbers, names[0]).val('energy')}.")
    return " ".join(answers)


# ---------------------------------------------------------------- theory


def theory(records: Records) -> str:
    if not records:
        return "No theorem was checked in the tier behind this copy."
    verified = [step["holds"] for record in records.values() for step in record["proof"]]
    held = [case["holds"] for record in records.values() for case in record["cases"]]
    violated = [record["control"]["violated"] for record in records.values()]
    parts = [
        f"{_share(verified, 'proof step')} of {count(len(records), 'theorem')} {_verb(verified, 'is', 'are')} verified",
        f"{_share(held, 'measured case')} {_verb(held, 'lies within its bound', 'lie within their bounds')}",
        f"and {_share(violated, 'negative control')} {_verb(violated, 'violates its bound', 'violate their bounds')}",
    ]
    return f"In the run behind this copy, {', '.join(parts)}."


def failures(records: Records) -> str:
    failed = [name for name, record in records.items() if not record["holds"]]
    return rf"\textbf{{These do not stand in this run: {', '.join(failed)}.}}" if failed else ""


# ---------------------------------------------------------------- costs


def compute(numbers: Numbers, records: Records) -> str:
    taken = "; ".join(f"{Sentences(numbers, name).val('wall')} ({subject})" for name, subject in subjects(numbers).items())
    text = rf"The training runs took {taken}; \cref{{tab:machines}} names the machines."
    return text + (rf" The theorem checks took \num{{{sum(record['seconds'] for record in records.values()):.0f}}}~s." if records else "")


# ---------------------------------------------------------------- the table of claims


def evidence(numbers: Numbers, records: Records, tier: str) -> list[Evidence]:
    first = next(iter(records), "T1")
    return [
        Evidence(
            rf"\Cref{{sec:theory}}: {count(len(records), 'theorem')}, proof steps, bounds, controls",
            "theory",
            f"results/{tier}/theory/{first}.json",
            "theory/",
            sum(record["seconds"] for record in records.values()),
            "the rule fails unless each step and case holds and each control violates",
        ),
        *(
            Evidence(
                rf"\Cref{{sec:{'llama' if name in LLAMA else name}}}: recovered gaps, state bytes, certified against measured error",
                "train",
                f"results/{tier}/{name}/*/*/run.json",
                f"train/{name}/",
                60 * numbers[f"{name}.live.wall"],
                rf"gap test; \texttt{{make verify}} against \path{{results/reference/{tier}.json}}",
            )
            for name in subjects(numbers)
        ),
        *(
            Evidence(
                rf"\Cref{{tab:{name}}} and the figures of \cref{{sec:{name}}}",
                f"notebook_{experiment.notebook}",
                f"results/{tier}/figures/{experiment.notebook}/numbers.json",
                f"notebooks/{experiment.notebook}",
                None,
                "records validated against their schema when read",
            )
            for name, experiment in present(numbers).items()
        ),
        Evidence(
            r"\Cref{tab:plan,tab:plan.contexts}: computed memory of models that are not trained here",
            "plan",
            f"results/{tier}/plan/*.json",
            "plan/",
            None,
            r"to the byte against optimizers, within five percent against the ledger: \path{tests/test_planner.py}",
        ),
        Evidence(
            r"\Cref{fig:nanochat.contexts}: memory against context length",
            "contexts",
            f"results/{tier}/contexts/*/0/run.json",
            "contexts",
            None,
            r"\path{tests/test_contexts.py}",
        ),
        Evidence(
            r"\Cref{sec:policy}: policies on held-out tasks, oracle, ablations",
            "policy_evaluation",
            f"results/{tier}/policy/evaluation.json",
            "policy/evaluation",
            None,
            r"\path{tests/test_policy.py}, \path{tests/test_policy_runs.py}",
        ),
        Evidence(
            "The learned policies that ship, from traces to PPO",
            "policy",
            "results/long/policy/tinyformer.safetensors",
            "policy/ppo",
            None,
            r"recipe and agreement with experts in the files' headers; \path{tests/test_imitation.py}",
        ),
        Evidence(
            r"\Cref{tab:theorems} and the figures of \cref{sec:theory}",
            "notebook_02_theory",
            f"results/{tier}/figures/02_theory/numbers.json",
            "notebooks/02_theory",
            None,
            r"\path{tests/test_notebooks.py}",
        ),
        Evidence(
            "Every number, table and verdict in this text",
            "numbers",
            f"paper/generated/{tier}/numbers.json",
            "",
            None,
            r"a missing value stops the build; \path{tests/test_paper.py}, \path{tests/test_paper_verdicts.py}",
        ),
        Evidence(
            "This document",
            "paper",
            "paper/build/mango.pdf" if tier == "laptop" else f"paper/build/{tier}/mango.pdf",
            "",
            None,
            "no undefined reference, no overfull box, equal bytes from equal inputs",
        ),
    ]


# ---------------------------------------------------------------- wording


def _share(verdicts: list[bool], noun: str) -> str:
    if all(verdicts):
        return f"the one {noun}" if len(verdicts) == 1 else rf"each of the \num{{{len(verdicts)}}} {noun}s"
    return rf"\textbf{{only \num{{{sum(verdicts)}}}}} of the \num{{{len(verdicts)}}} {noun}s"


def _verb(verdicts: list[bool], one: str, many: str) -> str:
    """The form that agrees with ``_share``."""
    return one if all(verdicts) else many

"""Sentences whose wording depends on the numbers: the text stays true whichever data, tier or outcome stands behind it.

Each function returns LaTeX in which numbers appear as ``\\val{key}``; nothing here formats one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Any

from paper_numbers import Numbers

Records = Mapping[str, Mapping[str, Any]]
AIM = {"recovered": 0.90, "state": 1.1}  # set before any run: at least this share of the gap in at most so many bytes per parameter


@dataclass(frozen=True)
class Evidence:
    """One row of the table of claims; ``benchmark`` is a prefix of Snakemake's benchmark files, ``seconds`` what is known without them."""

    text: str
    rule: str
    file: str
    benchmark: str
    seconds: float | None
    guard: str


def sentences(numbers: Numbers, records: Records, tier: str) -> str:
    """``claims.tex``."""
    found = {
        "abstract.theory": theory(records),
        "abstract.cifar10": abstract(numbers),
        "theory.summary": theory(records),
        "theory.failures": failures(records),
        "cifar10.setup": setup(numbers),
        "cifar10.data": data(numbers),
        "cifar10.gap": gap(numbers),
        "cifar10.headline": headline(numbers),
        "cifar10.peers": peers(numbers),
        "cifar10.ablations": ablations(numbers),
        "cifar10.contraction": contraction(numbers),
        "cifar10.caption": caption(numbers, "cifar10"),
        "cifar10.live.caption": caption(numbers, "cifar10.live"),
        "limitations.scale": r"The runs behind this copy train \val{cifar10.parameters} parameters for \val{cifar10.steps} steps on \val{cifar10.train} images.",
        "limitations.energy": energy(numbers),
        "reproducibility.compute": compute(numbers, records),
    }
    return "".join(f"\\mangosentence{{{key}}}{{{text}}}\n" for key, text in found.items())


# ---------------------------------------------------------------- theory


def theory(records: Records) -> str:
    if not records:
        return "No theorem was checked in the tier behind this copy."
    cases = [case for record in records.values() for case in record["cases"]]
    steps = [step for record in records.values() for step in record["proof"]]
    held = sum(case["holds"] for case in cases)
    proved = sum(step["holds"] for step in steps)
    violated = sum(record["control"]["violated"] for record in records.values())
    return (
        rf"In the run behind this copy, {_share(proved, len(steps), 'proof step')} of {_count(len(records), 'theorem')} {_verb(proved, len(steps), 'is', 'are')} "
        rf"verified, {_share(held, len(cases), 'measured case')} {_verb(held, len(cases), 'lies within its bound', 'lie within their bounds')}, and "
        rf"{_share(violated, len(records), 'negative control')} {_verb(violated, len(records), 'violates the bound that it must', 'violate the bounds that they must')} violate."
    )


def failures(records: Records) -> str:
    failed = [name for name, record in records.items() if not record["holds"]]
    return rf"\textbf{{These do not stand in this run: {', '.join(failed)}.}}" if failed else ""


# ---------------------------------------------------------------- image classification


def caption(numbers: Numbers, prefix: str) -> str:
    return rf"Data: \val{{{prefix}.data}}. Records: \val{{{prefix}.tier_label}}. Machine: \val{{{prefix}.machine}}."


def setup(numbers: Numbers) -> str:
    return (
        r"A residual network~\citep{he2016resnet} of \val{cifar10.parameters} parameters is trained for \val{cifar10.steps} steps of \val{cifar10.batch} images "
        r"on \val{cifar10.train} images and tested on \val{cifar10.test}; \val{cifar10.runs} runs in all, with "
        + (r"one seed" if numbers["cifar10.seeds"] == 1 else r"\val{cifar10.seeds} seeds")
        + r" for each variant (records: \val{cifar10.tier_label})."
    )


def data(numbers: Numbers) -> str:
    title = numbers["cifar10.data"].upper()
    if not title.startswith("CIFAR-10"):
        return (
            r"The images are \val{cifar10.data}. They stand in for CIFAR-10~\citep{krizhevsky2009cifar}, which was not at hand: "
            "nothing below is a statement about CIFAR-10."
        )
    text = r"The images are those of~\citep{krizhevsky2009cifar}, read as \val{cifar10.data}."
    return text + (" This copy is lossy, so accuracies do not compare with those on the raw images." if "JPEG" in title else "")


def abstract(numbers: Numbers) -> str:
    """The headline in one sentence."""
    name, where = numbers["cifar10.headline"], r"On \val{cifar10.data} (records: \val{cifar10.tier_label})"
    if name is None or numbers[f"cifar10.{name}.recovered"] is None:
        return (
            where
            + " the runs behind this copy are too few or too short to decide a comparison of optimizers: they are shown and support no claim."
        )
    return (
        rf"{where}, \val{{cifar10.{name}.label}} recovers \val{{cifar10.{name}.recovered}} of the loss gap between frozen and dense training with "
        rf"\val{{cifar10.{name}.state}}~bytes of optimizer state per parameter, everything kept between steps counted; dense training keeps "
        rf"\val{{cifar10.{numbers['cifar10.dense']}.state}}."
    )


def gap(numbers: Numbers) -> str:
    if numbers["cifar10.gap"] is None:
        return "A control is missing from the records, so no verdict is possible."
    losses = (
        rf"Frozen training ends at a test loss of \val{{cifar10.{numbers['cifar10.frozen']}.loss}}, dense training at "
        rf"\val{{cifar10.{numbers['cifar10.dense']}.loss}}: a gap of \val{{cifar10.gap}}."
    )
    if numbers["cifar10.gap_ratio"] is not None:
        losses += r" That is \val{cifar10.gap_ratio} times the standard deviation of dense training over seeds."
    if numbers["cifar10.gap_passes"]:
        return losses + " The task passes the test, and its recovered gaps are evidence."
    return losses + r" The task does not pass the test (\val{cifar10.gap_reason}): what follows is shown and supports no claim."


def headline(numbers: Numbers) -> str:
    name = numbers["cifar10.headline"]
    if name is None:
        return "No complete variant of Mango was run in this tier."
    key = f"cifar10.{name}"
    if numbers[f"{key}.recovered"] is None:
        return (
            rf"\val{{{key}.label}} ends at a test loss of \val{{{key}.loss}} with \val{{{key}.state}}~bytes of optimizer state per parameter, "
            rf"where the dense control keeps \val{{cifar10.{numbers['cifar10.dense']}.state}}. As the task does not decide, we draw no conclusion from it."
        )
    text = (
        rf"\val{{{key}.label}} recovers \val{{{key}.recovered}} of the gap with \val{{{key}.state}}~bytes of optimizer state per parameter, "
        rf"where the dense control keeps \val{{cifar10.{numbers['cifar10.dense']}.state}}."
    )
    met = numbers[f"{key}.recovered"] >= AIM["recovered"] and numbers[f"{key}.state"] <= AIM["state"]
    aim = rf"\num{{{AIM['recovered']:.2f}}} of the gap in at most \num{{{AIM['state']}}} bytes per parameter"
    return text + (
        f" This meets the aim set beforehand, at least {aim}." if met else f" This falls short of the aim set beforehand, at least {aim}."
    )


def peers(numbers: Numbers) -> str:
    """Whether any peer beats the headline variant in state and in recovered gap at once; the Pareto question."""
    name = numbers["cifar10.headline"]
    rivals = [
        v for v in numbers["cifar10.variants"] if numbers[f"cifar10.{v}.group"] == "peer" and numbers[f"cifar10.{v}.recovered"] is not None
    ]
    if name is None or not rivals or not numbers["cifar10.gap_passes"]:
        return ""
    own_gap, own_state = numbers[f"cifar10.{name}.recovered"], numbers[f"cifar10.{name}.state"]
    better = [v for v in rivals if numbers[f"cifar10.{v}.recovered"] > own_gap]
    text = (
        rf"Of the {_count(len(rivals), 'other method')} none recovers more."
        if not better
        else rf"Of the {_count(len(rivals), 'other method')}, {_list(better)} {_verb(1, len(better), 'recovers', 'recover')} more."
    )
    dominating = [v for v in better if numbers[f"cifar10.{v}.state"] <= own_state]
    if dominating:
        return (
            text
            + rf" {_list(dominating)} {_verb(1, len(dominating), 'does', 'do')} so with no more state, so this variant is not on the Pareto front."
        )
    return text + (
        " None of these does so with as little state: the variant is on the Pareto front of the methods compared." if better else ""
    )


def ablations(numbers: Numbers) -> str:
    name = numbers["cifar10.headline"]
    found = [
        v for v in numbers["cifar10.variants"] if numbers.get(f"cifar10.{v}.ablates") and numbers[f"cifar10.{v}.recovered"] is not None
    ]
    if name is None or not found:
        return "No variant that differs from it in one setting was run in this tier."
    parts = []
    for v in found:
        difference = numbers[f"cifar10.{v}.recovered"] - numbers[f"cifar10.{name}.recovered"]
        spread = [numbers[f"cifar10.{v}.recovered_std"], numbers[f"cifar10.{name}.recovered_std"]]
        if None in spread:
            verdict = "from one seed, no verdict"
        elif abs(difference) > 2 * hypot(*spread):
            verdict = ("more" if difference > 0 else "less") + " by over two standard deviations of the difference"
        else:
            verdict = "within two standard deviations of the difference"
        parts.append(
            rf"\val{{cifar10.{v}.ablates}} the recovered gap is \val{{cifar10.{v}.recovered}} at \val{{cifar10.{v}.state}} bytes per parameter ({verdict})"
        )
    return (
        rf"Changing one setting of \val{{cifar10.{name}.label}}, which recovers \val{{cifar10.{name}.recovered}}: " + "; ".join(parts) + "."
    )


def contraction(numbers: Numbers) -> str:
    if not numbers["cifar10.contraction.count"]:
        return "No run of this tier recorded its contraction."
    text = (
        r"Mango's runs record \val{cifar10.contraction.count} pairs of the share of the squared norm that compression must keep and the share that it "
        r"kept, over layers, steps and seeds (\cref{fig:contraction}). The median share kept is \val{cifar10.contraction.kept}, and the median of kept "
        r"over certified is \val{cifar10.contraction.median}. "
    )
    if numbers["cifar10.contraction.layers_below"]:
        text += r"\textbf{Averaged over steps and seeds, \val{cifar10.contraction.layers_below} of \val{cifar10.contraction.layers} layers lie below their certificate.}"
    else:
        text += r"Averaged over steps and seeds, none of the \val{cifar10.contraction.layers} layers (counted for each variant) lies below its certificate"
        text += (
            "; nor does any single value."
            if not numbers["cifar10.contraction.below"]
            else r"; of the single values \val{cifar10.contraction.below} do, as they may, since the certificate bounds an expectation over the scouts."
        )
    return text


def energy(numbers: Numbers) -> str:
    return r"Energy of the runs: \val{cifar10.energy}."


def compute(numbers: Numbers, records: Records) -> str:
    total = rf" The theorem checks took \num{{{sum(record['seconds'] for record in records.values()):.0f}}}~s." if records else ""
    return r"The training runs took \val{cifar10.wall} in all; \cref{tab:machines} names the machines." + total


# ---------------------------------------------------------------- the table of claims


def evidence(numbers: Numbers, records: Records, tier: str) -> list[Evidence]:
    first = next(iter(records), "T1")
    return [
        Evidence(
            rf"\Cref{{sec:theory}}: {_count(len(records), 'theorem')}, proof steps, bounds, controls",
            "theory",
            f"results/{tier}/theory/{first}.json",
            "theory/",
            sum(record["seconds"] for record in records.values()),
            "the rule fails unless each step and case holds and each control violates",
        ),
        Evidence(
            r"\Cref{sec:cifar10}: recovered gaps, state bytes, certified against measured error",
            "train",
            f"results/{tier}/cifar10/*/*/run.json",
            "train/cifar10/",
            None,
            rf"gap test; \texttt{{make verify}} against \path{{results/reference/{tier}.json}}",
        ),
        Evidence(
            r"\Cref{tab:cifar10,fig:curves,fig:pareto,fig:recovered,fig:contraction}",
            "notebook_01_cifar10",
            f"results/{tier}/figures/01_cifar10/numbers.json",
            "notebooks/01_cifar10",
            None,
            "records validated against their schema when read",
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
            r"a missing value stops the build; \path{tests/test_paper.py}",
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


def _list(variants: list[str]) -> str:
    labels = [rf"\val{{cifar10.{variant}.label}}" for variant in variants]
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]


def _count(number: int, noun: str) -> str:
    return rf"\num{{{number}}} {noun}{'' if number == 1 else 's'}"


def _share(part: int, whole: int, noun: str) -> str:
    if part == whole:
        return f"the one {noun}" if whole == 1 else rf"each of the \num{{{whole}}} {noun}s"
    return rf"\textbf{{only \num{{{part}}}}} of the \num{{{whole}}} {noun}s"


def _verb(part: int, whole: int, one: str, many: str) -> str:
    """The form that agrees with ``_share(part, whole, ...)``, or with ``whole`` things when part is 1."""
    return one if part == whole else many

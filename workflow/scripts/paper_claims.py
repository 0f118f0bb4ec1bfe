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
        "cifar10.caption": caption("cifar10"),
        "cifar10.live.caption": caption("cifar10.live"),
        "limitations.scale": f"These runs train {val('parameters')} parameters for {val('steps')} steps on {val('train')} images.",
        "limitations.energy": f"Energy of the runs: {val('energy')}.",
        "reproducibility.compute": compute(records),
    }
    return "".join(f"\\mangosentence{{{key}}}{{{text}}}\n" for key, text in found.items())


def val(*parts: str, prefix: str = "cifar10") -> str:
    r"""``\val{cifar10.part.part}``."""
    return rf"\val{{{'.'.join((prefix, *parts))}}}"


# ---------------------------------------------------------------- theory


def theory(records: Records) -> str:
    if not records:
        return "No theorem was checked in the tier behind this copy."
    verified = [step["holds"] for record in records.values() for step in record["proof"]]
    held = [case["holds"] for record in records.values() for case in record["cases"]]
    violated = [record["control"]["violated"] for record in records.values()]
    parts = [
        f"{_share(verified, 'proof step')} of {_count(len(records), 'theorem')} {_verb(verified, 'is', 'are')} verified",
        f"{_share(held, 'measured case')} {_verb(held, 'lies within its bound', 'lie within their bounds')}",
        f"and {_share(violated, 'negative control')} {_verb(violated, 'violates its bound', 'violate their bounds')}",
    ]
    return f"In the run behind this copy, {', '.join(parts)}."


def failures(records: Records) -> str:
    failed = [name for name, record in records.items() if not record["holds"]]
    return rf"\textbf{{These do not stand in this run: {', '.join(failed)}.}}" if failed else ""


# ---------------------------------------------------------------- image classification


def caption(prefix: str) -> str:
    data, records, machine = (val(key, prefix=prefix) for key in ("data", "tier_label", "machine"))
    return f"Data: {data}. Records: {records}. Machine: {machine}."


def setup(numbers: Numbers) -> str:
    seeds = "one seed" if numbers["cifar10.seeds"] == 1 else f"{val('seeds')} seeds"
    return (
        rf"A residual network~\citep{{he2016resnet}} of {val('parameters')} parameters is trained for {val('steps')} steps of "
        f"{val('batch')} images on {val('train')} images and tested on {val('test')}; {val('runs')} runs in all, with at least "
        f"{seeds} for each variant (records: {val('tier_label')})."
    )


def data(numbers: Numbers) -> str:
    title = numbers["cifar10.data"].upper()
    if not title.startswith("CIFAR-10"):
        return (
            rf"The images are {val('data')}. They stand in for CIFAR-10~\citep{{krizhevsky2009cifar}}, which was not at hand: "
            "nothing below is a statement about CIFAR-10."
        )
    text = rf"The images are those of~\citet{{krizhevsky2009cifar}}, read as {val('data')}."
    return text + (" This copy is lossy, so accuracies do not compare with those on the raw images." if "JPEG" in title else "")


def abstract(numbers: Numbers) -> str:
    """The headline in one sentence."""
    name, where = numbers["cifar10.headline"], f"On {val('data')} (records: {val('tier_label')})"
    if name is None or numbers[f"cifar10.{name}.recovered"] is None:
        return f"{where} the runs behind this copy are too few or too short to compare optimizers: they are shown and support no claim."
    return (
        f"{where}, {val(name, 'label')} recovers {val(name, 'recovered')} of the loss gap between frozen and dense training with "
        f"{val(name, 'state')}~bytes of optimizer state per parameter, everything kept between steps counted; "
        f"dense training keeps {val(numbers['cifar10.dense'], 'state')}."
    )


def gap(numbers: Numbers) -> str:
    if numbers["cifar10.gap"] is None:
        return "A control is missing from the records, so no verdict is possible."
    dense, frozen = (val(numbers[f"cifar10.{control}"], "loss") for control in ("dense", "frozen"))
    text = f"Frozen training ends at a test loss of {frozen}, dense training at {dense}: a gap of {val('gap')}."
    if numbers["cifar10.gap_ratio"] is not None:
        text += f" That is {val('gap_ratio')} times the standard deviation of dense training over seeds."
    if numbers["cifar10.gap_passes"]:
        return text + " The task passes the test, and its recovered gaps are evidence."
    return text + f" The task does not pass the test ({val('gap_reason')}): what follows is shown and supports no claim."


def headline(numbers: Numbers) -> str:
    name = numbers["cifar10.headline"]
    if name is None:
        return "No complete variant of Mango was run in this tier."
    dense = val(numbers["cifar10.dense"], "state")
    state = f"{val(name, 'state')}~bytes of optimizer state per parameter, where the dense control keeps {dense}"
    if numbers[f"cifar10.{name}.recovered"] is None:
        end = f"{val(name, 'label')} ends at a test loss of {val(name, 'loss')} with {state}."
        return end + " As the task does not decide, we draw no conclusion from it."
    met = numbers[f"cifar10.{name}.recovered"] >= AIM["recovered"] and numbers[f"cifar10.{name}.state"] <= AIM["state"]
    aim = rf"at least \num{{{AIM['recovered']:.2f}}} of the gap in at most \num{{{AIM['state']}}} bytes per parameter"
    verdict = f"This {'meets' if met else 'falls short of'} the aim set beforehand, {aim}."
    return f"{val(name, 'label')} recovers {val(name, 'recovered')} of the gap with {state}. {verdict}"


def peers(numbers: Numbers) -> str:
    """Whether another method recovers more than the headline variant, and whether one does so with no more state."""
    name = numbers["cifar10.headline"]
    if name is None or not numbers["cifar10.gap_passes"]:
        return ""
    others = [other for other in numbers["cifar10.variants"] if numbers[f"cifar10.{other}.group"] == "peer"]
    if not others:
        return ""
    better = [other for other in others if numbers[f"cifar10.{other}.recovered"] > numbers[f"cifar10.{name}.recovered"]]
    dominating = [other for other in better if numbers[f"cifar10.{other}.state"] <= numbers[f"cifar10.{name}.state"]]
    text = f"Of the {_count(len(others), 'other method')} {_list(better) or 'none'} recover{'s' if len(better) < 2 else ''} more."
    if dominating:
        return f"{text} {_list(dominating)} with no more state, so this variant is not on the Pareto front."
    return text + (
        " None of these does so with as little state: the variant is on the Pareto front of the methods compared." if better else ""
    )


def ablations(numbers: Numbers) -> str:
    name = numbers["cifar10.headline"]
    changed = [variant for variant in numbers["cifar10.variants"] if numbers[f"cifar10.{variant}.ablates"]]
    if not changed:
        return "No variant that differs from it in one setting was run in this tier."
    if not numbers["cifar10.gap_passes"]:
        return "As the task does not decide, the variants that differ in one setting are listed without a verdict."
    parts = [
        f"{val(variant, 'ablates')} the recovered gap is {val(variant, 'recovered')} at {val(variant, 'state')} bytes per parameter "
        f"({_difference(numbers, variant, name)})"
        for variant in changed
    ]
    return f"Changing one setting of {val(name, 'label')}, which recovers {val(name, 'recovered')}: {'; '.join(parts)}."


def _difference(numbers: Numbers, variant: str, reference: str) -> str:
    spread = [numbers[f"cifar10.{name}.recovered_std"] for name in (variant, reference)]
    if None in spread:
        return "from one seed, no verdict"
    difference = numbers[f"cifar10.{variant}.recovered"] - numbers[f"cifar10.{reference}.recovered"]
    if abs(difference) <= 2 * hypot(*spread):
        return "within two standard deviations of the difference"
    return f"{'more' if difference > 0 else 'less'} by over two standard deviations of the difference"


def contraction(numbers: Numbers) -> str:
    if not numbers["cifar10.contraction.count"]:
        return "No run of this tier recorded its contraction."
    layers = val("contraction", "layers")
    text = (
        f"Mango's runs record {val('contraction', 'count')} pairs of the share of the squared norm that compression must keep and the "
        rf"share that it kept, over layers, steps and seeds (\cref{{fig:contraction}}). The median share kept is "
        f"{val('contraction', 'kept')}, and the median of kept over certified is {val('contraction', 'median')}. "
    )
    if numbers["cifar10.contraction.layers_below"]:
        below = val("contraction", "layers_below")
        return text + rf"\textbf{{Averaged over steps and seeds, {below} of {layers} layers lie below their certificate.}}"
    text += f"Averaged over steps and seeds, none of the {layers} layers (counted for each variant) lies below its certificate"
    if not numbers["cifar10.contraction.below"]:
        return text + "; nor does any single value."
    below = val("contraction", "below")
    return text + f"; of the single values {below} do, as they may, since the certificate bounds an expectation over the scouts."


def compute(records: Records) -> str:
    text = rf"The training runs took {val('wall')} in all; \cref{{tab:machines}} names the machines."
    return text + (rf" The theorem checks took \num{{{sum(record['seconds'] for record in records.values()):.0f}}}~s." if records else "")


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
            60 * numbers["cifar10.live.wall"],
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
    labels = [val(variant, "label") for variant in variants]
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


def _count(number: int, noun: str) -> str:
    return rf"\num{{{number}}} {noun}{'' if number == 1 else 's'}"


def _share(verdicts: list[bool], noun: str) -> str:
    if all(verdicts):
        return f"the one {noun}" if len(verdicts) == 1 else rf"each of the \num{{{len(verdicts)}}} {noun}s"
    return rf"\textbf{{only \num{{{sum(verdicts)}}}}} of the \num{{{len(verdicts)}}} {noun}s"


def _verb(verdicts: list[bool], one: str, many: str) -> str:
    """The form that agrees with ``_share``."""
    return one if all(verdicts) else many

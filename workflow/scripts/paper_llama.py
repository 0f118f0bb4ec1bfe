"""Sentences and tables of LLaMA's pre-training, fine-tuning and sentiment. Which words surround the numbers follows from their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paper_experiments import Sentences, count
from paper_numbers import Numbers, escape

AIM = 0.95  # of the gap in pre-training, set beforehand
KEYS = ("pretrain", "gap", "outcome", "peer", "finetune", "finetune_gap", "bytes", "paged", "sentiment")
GUESSES = 2  # standard deviations of guessing that an accuracy has to lie above chance
REPORTED = {"adamw": "Full-rank AdamW", "galore": "GaLore"}  # our optimizer -> the row of paper/reported.json


def sentences(numbers: Numbers) -> dict[str, str]:
    """Every sentence by its key; of a tier without the experiments, that they were not run."""
    if "llama-pretrain.variants" not in numbers:
        return {f"llama.{key}": "LLaMA was not trained in the tier behind this copy." for key in KEYS}
    first, second = Sentences(numbers, "llama-pretrain"), Sentences(numbers, "llama-finetune")
    return {
        "llama.pretrain": setup(first, "trained from random weights"),
        "llama.gap": first.gap(),
        "llama.outcome": outcome(first),
        "llama.peer": paired(first, "peer"),
        "llama.finetune": setup(second, "trained further from the model that dense AdamW pre-trained there"),
        "llama.finetune_gap": second.gap(),
        "llama.bytes": at_the_same_bytes(second),
        "llama.paged": paged(second),
        "llama.sentiment": sentiment(Sentences(numbers, "llama-sentiment")),
    }


def setup(said: Sentences, what: str) -> str:
    val = said.val
    return (
        f"A LLaMA of {val('parameters')} parameters is {what}, for {val('steps')} steps of {val('batch')} windows of {val('sequence')} "
        f"{escape(said.get('unit'))}s (data: {val('data')}; records: {val('tier_label')}; machine: {val('machine')}; {val('runs')} runs). "
        f"Under test are {val('under_test')} of the parameters."
    )


def outcome(said: Sentences) -> str:
    name = said.get("headline")
    if name is None or said.get(name, "recovered") is None:
        return "As the task does not decide in this tier, the methods are listed without a verdict."
    met = said.get(name, "recovered") >= AIM
    return (
        f"{said.val(name, 'label')} recovers {said.val(name, 'recovered')} of the gap; it {'meets' if met else 'falls short of'} the aim "
        rf"set beforehand, \num{{{AIM}}}. Its perplexity per {escape(said.get('unit'))} is {said.val(name, 'perplexity')}, that of dense "
        f"AdamW {said.val(said.get('dense'), 'perplexity')}, with {said.val(name, 'state')} and {said.val(said.get('dense'), 'state')} "
        "bytes of state per parameter."
    )


def paired(said: Sentences, rival: str) -> str:
    """A difference in test loss with its interval, or why there is no test."""
    name = said.get(rival, "name")
    if name is None or said.get("headline") is None:
        return "There is no other method to compare with."
    text = (
        f"Against {said.val(name, 'label')} the difference in test loss is {said.val(rival, 'difference')}, paired over "
        f"{count(said.get(rival, 'pairs'), 'seed')}"
    )
    low, high = said.get(rival, "low"), said.get(rival, "high")
    if low is None:
        return f"{text}: too few for a test."
    verdict = "Mango is better" if high < 0 else "Mango is worse" if low > 0 else "the two are not told apart"
    return rf"{text} (\SI{{95}}{{\percent}} interval {said.val(rival, 'low')} to {said.val(rival, 'high')}, by Student's $t$): {verdict}."


def at_the_same_bytes(said: Sentences) -> str:
    """The answer to the question of the section, whichever way it falls."""
    ours, theirs = said.get("headline"), said.get("quantised")
    if ours is None or theirs is None:
        return "One of the two was not run in this tier."
    total = {name: said.get(name, "held", "total") for name in (ours, theirs)}
    beside = {name: said.get(name, "held", "gradients") + said.get(name, "held", "optimizer_state") for name in (ours, theirs)}
    text = (
        f"Counting weights, gradients and state, {said.val(ours, 'label')} holds {said.val(ours, 'held', 'total')} bytes per parameter and "
        f"{said.val(theirs, 'label')} {said.val(theirs, 'held', 'total')}. "
    )
    if not said.get("gap_passes"):
        return text + "As the task does not decide in this tier, which of them is better is left open."
    better = said.get(ours, "loss") < said.get(theirs, "loss")
    order = f"perplexity {said.val(ours, 'perplexity')} against {said.val(theirs, 'perplexity')}"
    if total[ours] <= total[theirs]:
        text += f"At no more bytes full fine-tuning by Mango reaches {'a lower' if better else 'no lower'} perplexity: {order}. "
    else:
        text += (
            "So the comparison at the same bytes is not won: full fine-tuning keeps every weight in the precision in which it is trained, "
            f"and that alone is more than a base of four bits. With those more bytes it reaches {'a lower' if better else 'no lower'} "
            f"perplexity: {order}. "
        )
    least = "less" if beside[ours] < beside[theirs] else "more"
    text += f"Gradients and state, which is what an optimizer can save, take {least} with Mango than with the factors. "
    return text + paired(said, "quantised")


def paged(said: Sentences) -> str:
    optimizers = {said.get(name, "optimizer") for name in said.get("variants")}
    return "" if "pagedadamw8bit" in optimizers else "Paged AdamW pages the memory of a CUDA device; it was not run in this tier."


def sentiment(said: Sentences) -> str:
    """What was asked, what guessing reaches, and which methods do better."""
    if f"{said.name}.variants" not in said.numbers:
        return "Sentiment was not run in the tier behind this copy."
    val, names = said.val, said.get("variants")
    above = [name for name in names if said.get(name, "accuracy") > said.get("chance") + GUESSES * said.get("chance_std")]
    stand_in = "; they stand in for reviews, and nothing here is a statement about sentiment" if "stand-in" in said.get("data") else ""
    text = (
        f"A LLaMA of {val('parameters')} parameters that dense AdamW pre-trained on text is trained further, for {val('steps')} steps of "
        f"{val('batch')} reviews, to give the verdict after the last words of a review and a fixed question, {val('sequence')} positions "
        f"in all (data: {val('data')}{stand_in}; records: {val('tier_label')}; machine: {val('machine')}; {val('runs')} runs). On the "
        f"{val('test')} test reviews a constant answer is right in {val('chance')} of the cases, and guesses stray from that by a "
        f"standard deviation of {val('chance_std')}. "
    )
    if not above:
        return text + rf"No method ends more than \num{{{GUESSES}}} of these above it: none is told apart from guessing."
    best, ours, dense = max(names, key=lambda name: said.get(name, "accuracy")), said.get("headline"), said.get("dense")
    text += (
        rf"Of the {count(len(names), 'method')}, \num{{{len(above)}}} {'ends' if len(above) == 1 else 'end'} more than "
        rf"\num{{{GUESSES}}} of these above it; the highest accuracy is that of {val(best, 'label')}, {val(best, 'accuracy')}."
    )
    if ours is None or dense is None:
        return text
    return f"{text} {val(ours, 'label')} reaches {val(ours, 'accuracy')}, and {val(dense, 'label')} {val(dense, 'accuracy')}."


# ---------------------------------------------------------------- tables


def tables(numbers: Numbers, reported: Mapping[str, Any]) -> dict[str, str]:
    """All three, by name."""
    return {
        "llama_pretrain": pretrain_table(numbers, reported),
        "llama_finetune": finetune_table(numbers),
        "llama_sentiment": sentiment_table(numbers),
    }


def pretrain_table(numbers: Numbers, reported: Mapping[str, Any]) -> str:
    from paper_tables import plus_minus, tabular

    column = reported["columns"][0]
    printed = {row["method"]: row["values"][0][0] for row in reported["rows"]}
    head = ["", "seeds", "perplexity", "test loss", "recovered gap", "state (B/param.)", rf"\emph{{reported}}, {column}"]
    rows = []
    for name in numbers.get("llama-pretrain.variants", []):
        key = f"llama-pretrain.{name}"
        cells = [plus_minus(numbers, f"{key}.{field}") for field in ("perplexity", "loss", "recovered")]
        frozen = name == numbers["llama-pretrain.frozen"]
        theirs = "" if frozen else printed.get(REPORTED.get(numbers[f"{key}.optimizer"], ""), "")
        rows.append([escape(numbers[f"{key}.label"]), numbers.latex(f"{key}.seeds"), *cells, numbers.bare(f"{key}.state"), escape(theirs)])
    return tabular("l r r r r r r", head, rows or [["not run in this tier", *[""] * 6]])


def finetune_table(numbers: Numbers) -> str:
    from paper_tables import plus_minus, tabular

    head = ["", "seeds", "perplexity", "recovered gap", "weights", "gradients", "state", "total (B/param.)"]
    rows = []
    for name in numbers.get("llama-finetune.variants", []):
        key = f"llama-finetune.{name}"
        cells = [plus_minus(numbers, f"{key}.{field}") for field in ("perplexity", "recovered")]
        held = [numbers.bare(f"{key}.held.{field}") for field in ("parameters", "gradients", "optimizer_state", "total")]
        rows.append([escape(numbers[f"{key}.label"]), numbers.latex(f"{key}.seeds"), *cells, *held])
    return tabular("l r r r r r r r", head, rows or [["not run in this tier", *[""] * 7]])


def sentiment_table(numbers: Numbers) -> str:
    from paper_tables import comparison, tabular

    if "llama-sentiment.variants" not in numbers:
        return tabular("l", ["not run in this tier"], [])
    return comparison(numbers, "llama-sentiment", ("state", "state (B/param.)"))

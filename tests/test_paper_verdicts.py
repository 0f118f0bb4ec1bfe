"""What the paper says follows from the numbers: verdicts, comparisons, what is computed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_paper import generated
from tiny import ROOT, TIER, tiny_results

sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import paper_claims
import paper_experiments
import paper_llama
import paper_molegrad
import paper_numbers
import paper_plan
import paper_policy

ABLATION = {"cifar10": "mango-no-scouts", "language": "mango-noerror"}  # the variant of the tiny runs that differs in one setting
PEER = {"cifar10": "adafactor", "language": "muon"}


def altered(experiment: str = "cifar10", **changes: object) -> paper_experiments.Sentences:
    """The tiny runs' numbers as if the task had decided: Mango recovers 0.95 at 0.9 bytes, the peer 0.8 at 0.1; then the changes, in
    which "peer" and "ablation" stand for those variants."""
    numbers = paper_numbers.Numbers.read(tiny_results() / TIER / "figures")
    values = {key: dict(entry) for key, entry in numbers.values.items()}
    judged: dict[str, object] = {
        "gap": 0.5,
        "gap_ratio": 31.0,
        "gap_passes": True,
        "mango.recovered": 0.95,
        "mango.recovered_std": 0.01,
        "mango.state": 0.9,
        "peer.recovered": 0.8,
        "peer.state": 0.1,
        "ablation.recovered": 0.7,
        "ablation.recovered_std": 0.01,
    }
    for key, value in (judged | {key.replace("__", "."): value for key, value in changes.items()}).items():
        variant = key.replace("peer", PEER[experiment]).replace("ablation", ABLATION[experiment])
        values[f"{experiment}.{variant}"]["value"] = value
    return paper_experiments.Sentences(paper_numbers.Numbers(values), experiment)  # type: ignore[arg-type]


@pytest.mark.parametrize("experiment", PEER)
def test_a_task_that_does_not_decide_supports_no_claim(experiment: str) -> None:
    generated()
    text = altered(experiment, gap_passes=False, gap_reason="four steps decide nothing", mango__recovered=None)
    assert "supports no claim" in text.gap()
    assert "no conclusion" in text.headline()
    assert "support no claim" in text.abstract()
    assert text.peers() == ""


@pytest.mark.parametrize("experiment", PEER)
def test_verdicts_follow_the_numbers(experiment: str) -> None:
    generated()
    aim = paper_experiments.EXPERIMENTS[experiment]
    assert "passes the test" in altered(experiment).gap()
    assert "meets the aim" in altered(experiment, mango__recovered=aim.recovered).headline()
    assert "falls short" in altered(experiment, mango__recovered=aim.recovered - 0.05).headline()
    larger = altered(experiment, mango__recovered=aim.recovered, mango__state=1.2).headline()
    assert ("meets the aim" if aim.state is None else "falls short") in larger
    assert "none recovers more" in altered(experiment).peers()
    assert "not on the Pareto front" in altered(experiment, peer__recovered=0.97).peers()
    assert "is on the Pareto front" in altered(experiment, peer__recovered=0.97, peer__state=2.0).peers()
    assert "less by over two standard deviations" in altered(experiment).ablations()
    assert "within two standard deviations" in altered(experiment, ablation__recovered=0.94).ablations()
    assert "one seed, no verdict" in altered(experiment, mango__recovered_std=None).ablations()


def converted(**changes: object) -> paper_molegrad.Mole:
    """The tiny runs' numbers as if nanochat's task had decided, then the changes (``__`` stands for a dot, ``an_int4`` for its variant)."""
    numbers = paper_numbers.Numbers.read(tiny_results() / TIER / "figures")
    values = {key: dict(entry) for key, entry in numbers.values.items()}
    names = [name for name in values["nanochat.variants"]["value"] if values[f"nanochat.{name}.group"]["value"] == "mole"]
    judged: dict[str, object] = {"gap_passes": True, **{f"{name}.{field}": 0.96 for name in names for field in ("recovered", "own")}}
    for key, value in (judged | {key.replace("__", ".").replace("an_int4", "an-int4"): value for key, value in changes.items()}).items():
        values[f"nanochat.{key}"]["value"] = value
    return paper_molegrad.Mole(paper_numbers.Numbers(values), "nanochat")


def test_molegrads_verdicts_follow_the_numbers() -> None:
    generated()
    stores = converted().stores()
    assert stores.count("missed") == 2 and stores.count("met") == 1, "int4 under two optimizers, int2 under one"
    assert converted(an_int4__own=0.98).stores().count("missed") == 1
    assert "without runs of its optimizer" in converted(an_int4__own=None).stores()
    assert r"meets the \num{0.92} aimed at" in converted().factored()
    assert "falls short of" in converted(factored__recovered=0.9).factored()
    assert "A Q" in converted().factored() or r"\val{nanochat.sketch.label}" in converted().factored()
    assert (
        "within the" in converted(an_int4__bpb_ratio=-0.009).headline() and "outside the" in converted(an_int4__bpb_ratio=0.011).headline()
    )
    assert "no conclusion" in converted(an_int4__recovered=None).headline()
    undecided = converted(gap_passes=False)
    assert "without a verdict" in undecided.stores() and "without a verdict" in undecided.factored()
    assert "no card was measured" in converted().contexts() and "device reserved" in converted(contexts__measured=True).contexts()
    assert "keeps less than any of the codes" in converted(contexts__recompute__kept=0.01).contexts()
    assert "keeps more than" in converted(contexts__recompute__kept=0.99).contexts()
    assert "not looked for" in converted(contexts__cap=None).longest()


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [(1, 1, "one seed for"), (1, 3, r"one to \val{language.seeds_most} seeds for"), (3, 3, r"\val{language.seeds} seeds for")],
)
def test_the_number_of_seeds_is_said(least: int, most: int, words: str) -> None:
    generated()
    assert f"with {words} each variant" in altered("language", seeds=least, seeds_most=most).setup()


def test_stand_in_data_are_never_printed_as_cifar() -> None:
    generated()
    text = altered().data()
    assert "stand in for CIFAR-10" in text and "nothing below is a statement about CIFAR-10" in text
    assert "stand in" not in altered(data="CIFAR-10 (JPEG)").data()
    assert "stands in for a corpus" in altered("language").data()
    assert "WikiText" not in altered("language").data() and "merity" in altered("language", data="English text").data()


def tuned(**changes: object) -> str:
    """The answer to the question of equal bytes, where Mango holds 5 bytes at a loss of 1.0 and four bits 2 bytes at 1.2."""
    held = {"mango": (4.0, 0.5, 0.5), "qlora": (1.0, 0.4, 0.6)}
    values: dict[str, object] = {"headline": "mango", "quantised": "qlora", "gap_passes": True, "quantised.name": "qlora"}
    values |= {"mango.loss": 1.0, "qlora.loss": 1.2, "quantised.low": -0.3, "quantised.high": -0.1, "quantised.pairs": 3}
    for name, parts in held.items():
        values |= {f"{name}.held.{key}": part for key, part in zip(("parameters", "gradients", "optimizer_state"), parts, strict=True)}
        values[f"{name}.held.total"] = sum(parts)
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    numbers = paper_numbers.Numbers({f"llama-finetune.{key}": {"value": value} for key, value in values.items()})
    return paper_llama.at_the_same_bytes(paper_experiments.Sentences(numbers, "llama-finetune"))


def test_the_question_of_equal_bytes_is_answered_by_the_numbers() -> None:
    assert "is not won" in tuned() and "reaches a lower perplexity" in tuned() and "Mango is better" in tuned()
    assert "reaches no lower perplexity" in tuned(mango__loss=1.3)
    assert "At no more bytes" in tuned(mango__held__total=1.9) and "is not won" not in tuned(mango__held__total=1.9)
    assert "not told apart" in tuned(quantised__high=0.1)
    assert "too few for a test" in tuned(quantised__low=None)
    assert "take less with Mango" in tuned(mango__held__gradients=0.1) and "take more with Mango" in tuned(mango__held__gradients=0.6)
    assert "left open" in tuned(gap_passes=False) and "better" not in tuned(gap_passes=False).replace("which of them is better", "")


def judged(**changes: object) -> str:
    """Of three methods, of which guessing reaches 0.5 and strays by 0.025."""
    values: dict[str, object] = {"variants": ["adamw", "frozen", "mango"], "chance": 0.5, "chance_std": 0.025, "data": "reviews"}
    values |= {"headline": "mango", "dense": "adamw", "adamw.accuracy": 0.7, "frozen.accuracy": 0.54, "mango.accuracy": 0.68}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    numbers = paper_numbers.Numbers({f"llama-sentiment.{key}": {"value": value} for key, value in values.items()})
    return paper_llama.sentiment(paper_experiments.Sentences(numbers, "llama-sentiment"))


def test_verdicts_on_reviews_are_held_against_guessing() -> None:
    assert r"Of the \num{3} methods, \num{2} end more than \num{2} of these above it" in judged()
    assert r"the highest accuracy is that of \val{llama-sentiment.adamw.label}" in judged() and "stand in" not in judged()
    assert r"\num{1} ends more than" in judged(mango__accuracy=0.55)
    assert "none is told apart from guessing" in judged(mango__accuracy=0.55, adamw__accuracy=0.55)
    assert "nothing here is a statement about sentiment" in judged(data="code (embedded stand-in)")
    nothing = paper_experiments.Sentences(paper_numbers.Numbers({}), "llama-sentiment")
    assert paper_llama.sentiment(nothing) == "Sentiment was not run in the tier behind this copy."


def test_a_failed_theorem_is_said() -> None:
    record = json.loads((tiny_results() / TIER / "theory" / "T3.json").read_text())
    assert "each of the" in paper_claims.theory({"T3": record}) and paper_claims.failures({"T3": record}) == ""
    record["cases"][0]["holds"] = record["holds"] = record["control"]["violated"] = False
    assert r"\textbf{only" in paper_claims.theory({"T3": record})
    assert "do not stand in this run: T3" in paper_claims.failures({"T3": record})


def test_the_table_of_claims_names_rules_that_exist() -> None:
    generated()
    rules = "".join(path.read_text() for path in [ROOT / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")])
    for claim in paper_claims.evidence(altered().numbers, {}, "laptop"):
        if claim.rule.startswith("notebook_"):  # one rule for each notebook that the file lists
            assert 'f"notebook_{notebook}"' in rules and f'"{claim.rule.removeprefix("notebook_")}": ' in rules, claim.rule
        else:
            assert f"rule {claim.rule}:" in rules, claim.rule


# ---------------------------------------------------------------- what is computed


def planned(**fits: dict[str, int]) -> list[dict[str, Any]]:
    """Reports of two cards on which these methods fit, with their longest contexts."""
    reports = paper_plan.read(tiny_results() / TIER / "plan", "llama-7b")
    changed = []
    for report in reports:
        longest = fits[report["gpu"].partition(",")[0].replace(" ", "").lower()]
        rows = [row | {"fits": row["method"] in longest, "longest": longest.get(row["method"], 0)} for row in report["rows"]]
        changed.append({**report, "rows": rows})
    return changed


def test_what_fits_is_said_from_the_planners_report() -> None:
    generated()
    reports = planned(rtx4090={"mango-budget": 1500}, rtx5090={"galore": 900, "mango": 700, "mango-budget": 800})
    first, second = (paper_plan.outcome(report) for report in reports)
    assert "with plans chosen for the card fits, and no other method does; the longest context is \\num{1500} tokens, by Mango" in first
    assert "\\num{3} of the \\num{13} fit; the longest context is \\num{900} tokens, by GaLore." in second and "no other" not in second
    assert paper_plan.outcome(planned(rtx4090={}, rtx5090={})[0]).endswith("no method fits.")
    rows = paper_plan.rows(reports)
    assert len(rows) == 14 and [row[-4:] for row in rows[-2:]] == [["yes", r"\num{1500}", "", ""], ["", "", "yes", r"\num{800}"]]
    assert len(paper_plan.head(reports)[1]) == len(rows[0]) and rows[-1][0].endswith("of 32 GB")


def test_longer_contexts_are_said_by_their_ratio_and_against_the_aim() -> None:
    report = {"gpu": "A card, 9 GB", "rows": [{"method": "adamw", "longest": 100}, {"method": "mango+fused+int2", "longest": 250}]}
    said = paper_plan.longest(report)
    assert r"of plain AdamW is \num{100} tokens" in said and r"\num{2.50} times as long (Mango, the same, inputs" in said
    assert r"\num{3} times, is missed." in said
    report["rows"].append({"method": "mango+fused+int2-hidden", "longest": 300})
    assert r"\num{3} times, is met." in paper_plan.longest(report)


def test_plans_of_different_cases_are_not_put_in_one_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run the rule plan first"):
        paper_plan.read(tmp_path, "a")
    for seq in (64, 128):
        (tmp_path / f"a-{seq}.json").write_text(json.dumps({"model": "a", "seq": seq, "batch": 1, "dtype": "bf16", "total": seq}))
    with pytest.raises(ValueError, match="differ in seq"):
        paper_plan.read(tmp_path, "a")


# ---------------------------------------------------------------- policies


def policy_numbers(**changed: object) -> paper_numbers.Numbers:
    values: dict[str, object] = {
        "variants": ["budget", "tinyformer", "oracle"],
        "best_rule": "budget",
        "exceeded": 0,
        "difference": 0.0,
        "difference_low": -0.1,
        "difference_high": 0.1,
        "oracle": 0.5,
        "tinyformer.behind": -0.2,
        "ablations": ["low-rank budget", "full-rank budget"],
        "adds.imitation": 0.3,
        "adds.imitation_low": 0.1,
        "adds.imitation_high": 0.5,
        "expert": "static",
        "experts": ["static", "budget", "oracle"],
        "experts.runs": 16,
        "expert.oracle.agreement": 0.5,
        "improved.kept": "ppo",
    } | {key.replace("__", "."): value for key, value in changed.items()}
    return paper_numbers.Numbers({f"policy.{key}": {"value": value, "format": ".3f"} for key, value in values.items()})


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.3, -0.1, "worse than a simple rule"),
        (-0.1, 0.1, "not told apart"),
        (0.1, 0.3, "better than every rule"),
        (None, None, "no verdict"),
    ],
)
def test_the_verdict_on_the_learned_policy_follows_the_interval(low: float | None, high: float | None, verdict: str) -> None:
    assert verdict in paper_policy.outcome(policy_numbers(difference_low=low, difference_high=high))


def test_an_interval_of_one_seed_is_a_single_dash() -> None:
    keys = ("volume", "regret", "behind", "loss", "memory", "seconds")
    values: dict[str, object] = {f"{name}__{key}": 0.5 for name in ("tinyformer", "oracle") for key in keys}
    ends = {"tinyformer__low": 0.25, "tinyformer__high": 0.75, "oracle__low": None, "oracle__high": None}
    table = paper_policy.table(policy_numbers(variants=["tinyformer", "oracle"], **values, **ends))
    assert table.count(" to ") == 2 and r"\num{0.250} to \num{0.750}" in table  # with "to oracle", a heading
    assert table.count(r"\undefinedvalue{}") == 1


def test_the_text_on_policies_says_what_the_numbers_say() -> None:
    assert "no bound" in paper_policy.oracle(policy_numbers())
    assert "no bound" not in paper_policy.oracle(policy_numbers(tinyformer__behind=0.2))
    assert "was not run" in paper_policy.oracle(policy_numbers(oracle=None))
    text = paper_policy.ablations(policy_numbers())
    assert "ahead of PPO from random weights" in text and "without it" in text and "single precision" not in text
    assert "behind PPO from random weights" in paper_policy.ablations(policy_numbers(adds__imitation_low=-0.5, adds__imitation_high=-0.1))
    text = paper_policy.imitation(policy_numbers())
    assert r"Static \val{policy.expert.static.return}, Exact budget \val{policy.expert.budget.return}. The greedy oracle earned" in text
    assert "cloned from Static" in text
    assert "it was kept" in text and "turn on the draws" in text
    text = paper_policy.imitation(policy_numbers(expert="oracle", improved__kept="clone", expert__oracle__agreement=0.95))
    assert "cloned from Greedy oracle" in text and "the clone is what is shipped" in text and "turn on the draws" not in text
    assert r"\textbf" in paper_policy.setup(policy_numbers(exceeded=1)) and r"\textbf" not in paper_policy.setup(policy_numbers())


def test_experiments_whose_energy_has_one_answer_share_a_sentence() -> None:
    generated()
    same = altered("cifar10").numbers
    reasons = {key: entry["value"] for key, entry in same.values.items() if key.endswith(".energy")}
    assert len(reasons) > 1
    assert len(set(reasons.values())) == 1
    assert paper_claims.energy(same).count("Energy of the runs on") == 1
    assert " and " in paper_claims.energy(same)
    same.values["language.energy"]["value"] = "3.1 kJ"
    apart = paper_claims.energy(same)
    assert apart.count("Energy of the runs on") == 2
    assert r"\val{language.energy}" in apart

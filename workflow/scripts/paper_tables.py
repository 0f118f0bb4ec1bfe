"""The paper's tables, as booktabs ``tabular``s without float or caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import paper_claims
import paper_llama
import paper_plan
import paper_policy
from paper_experiments import EXPERIMENTS, present, subjects
from paper_numbers import Numbers, escape, printed

Records = Mapping[str, Mapping[str, Any]]
RULE = object()  # a line between groups of rows
METRICS = {"accuracy": r"test accuracy (\%)", "bits_per_byte": "test bits per byte"}


def tabular(columns: str, head: Sequence[str], rows: Sequence[Sequence[str] | object]) -> str:
    """A booktabs table; a row of its own named RULE draws a line."""
    body = [r"\midrule" if row is RULE else " & ".join(row) + r" \\" for row in rows]  # type: ignore[arg-type]
    title = " & ".join(head) + r" \\"
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", title, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def tables(
    numbers: Numbers,
    records: Records,
    plans: Sequence[paper_plan.Report],
    contexts: Sequence[paper_plan.Report],
    reported: Mapping[str, Any],
    tier: str,
    seconds: Mapping[str, float],
) -> dict[str, str]:
    """Every table by name."""
    absent = tabular("l", ["not run in this tier"], [])
    experiments = {f"{name}{kind}": absent for name in EXPERIMENTS for kind in ("", "_live", "_settings")}
    for name in present(numbers):
        experiments |= {
            name: comparison(numbers, name, EXPERIMENTS[name].cost),
            f"{name}_live": comparison(numbers, f"{name}.live", EXPERIMENTS[name].cost),
            f"{name}_settings": settings(numbers, name),
        }
    return experiments | {
        "theorems": theorem_table(records),
        "cases": cases(records),
        "plan": tabular(*paper_plan.head(plans), paper_plan.rows(plans)),
        "plan_contexts": tabular(*paper_plan.head(contexts), paper_plan.rows(contexts)),
        "claims": claims(numbers, records, tier, seconds),
        "policy": paper_policy.table(numbers),
        "policy_ablations": paper_policy.ablation_table(numbers),
        **paper_llama.tables(numbers, reported),
        "reported": reported_table(reported),
        "machines": machines(numbers),
    }


def comparison(numbers: Numbers, prefix: str, cost: tuple[str, str]) -> str:
    """Controls, peers, then Mango's variants and converted models; ``cost``: the field that says what a method keeps, and its head."""
    rows: list[Sequence[str] | object] = []
    group = ""
    for variant in numbers[f"{prefix}.variants"]:
        key = f"{prefix}.{variant}"
        if group and numbers[f"{key}.group"] != group:
            rows.append(RULE)
        group = numbers[f"{key}.group"]
        rows.append(
            [
                escape(numbers[f"{key}.label"]),
                numbers.latex(f"{key}.seeds"),
                plus_minus(numbers, f"{key}.{numbers[f'{prefix}.metric']}"),
                plus_minus(numbers, f"{key}.loss"),
                plus_minus(numbers, f"{key}.recovered"),
                numbers.bare(f"{key}.{cost[0]}"),
                numbers.bare(f"{key}.throughput"),
            ]
        )
    unit = escape(numbers[f"{prefix}.throughput_unit"])
    head = ["", "seeds", METRICS[numbers[f"{prefix}.metric"]], "test loss", "recovered gap", cost[1], unit]
    return tabular("l r r r r r r", head, rows)


def plus_minus(numbers: Numbers, key: str) -> str:
    """Mean and standard deviation over seeds."""
    if numbers[key] is None or numbers.get(f"{key}_std") is None:
        return numbers.bare(key)
    return rf"{numbers.bare(key)} {{\footnotesize$\pm$\,{numbers.bare(f'{key}_std')}}}"


def settings(numbers: Numbers, prefix: str) -> str:
    """Optimizer and options of every variant, from the configuration in its records."""
    rows = []
    for variant in numbers[f"{prefix}.variants"]:
        rows.append([numbers.latex(f"{prefix}.{variant}.{field}") for field in ("label", "optimizer", "lr", "options", "grid")])
    head = ["", "optimizer", "learning rate", "other options", "learning rates tried"]
    return tabular(r"l l r >{\raggedright\arraybackslash}p{2.6in} l", head, rows)


def theorem_table(records: Records) -> str:
    """One row per theorem: the case nearest to its bound, and the control that must lie beyond its own."""
    rows = []
    for name, record in records.items():
        control = record["control"]
        rows.append(
            [
                rf"\ref{{thm:{name}}}",
                escape(record["title"]),
                "tight" if record["tight"] else "valid",
                quantity(record["bound"]),
                quantity(record["measured"]),
                quantity(record["slack"], ".1e") if abs(record["slack"]) > 1e-12 else quantity(0, ".0f"),  # below rounding
                rf"{escape(control['name'])}: {quantity(control['measured'])} \textgreater{{}} {quantity(control['bound'])}",
                "yes" if control["violated"] else r"\textbf{no}",
            ]
        )
    paragraph = r">{\raggedright\arraybackslash}p"
    head = ["", "", "bound is", "bound", "measured", "slack", "negative control", "violated"]
    return tabular(rf"l {paragraph}{{1.5in}} l r r r {paragraph}{{2.9in}} l", head, rows)


def cases(records: Records) -> str:
    """Every measured case of every theorem."""
    rows: list[Sequence[str] | object] = []
    for name, record in records.items():
        rows += [RULE] if rows else []
        for number, case in enumerate(record["cases"]):
            verdict = "yes" if case["holds"] else r"\textbf{no}"
            label = rf"\ref{{thm:{name}}}" if not number else ""
            rows.append([label, escape(case["name"]), quantity(case["bound"]), quantity(case["measured"]), verdict])
    caption = "Every measured case of every theorem: what is claimed is that the measured value is at most the bound."
    head = ["", "case", "bound", "measured", "holds"]
    return longtable(caption, "tab:cases", r"l >{\raggedright\arraybackslash}p{3.6in} r r l", head, rows)


def longtable(caption: str, label: str, columns: str, head: Sequence[str], rows: Sequence[Sequence[str] | object]) -> str:
    """As tabular, over as many pages as it takes."""
    title = " & ".join(head) + r" \\"
    body = [r"\midrule" if row is RULE else " & ".join(row) + r" \\" for row in rows]  # type: ignore[arg-type]
    top = [r"\toprule", title, r"\midrule"]
    start = [rf"\begin{{longtable}}{{{columns}}}", rf"\caption{{{caption}}}\label{{{label}}}\\", *top, r"\endfirsthead"]
    lines = [*start, *top, r"\endhead", r"\bottomrule", r"\endfoot", *body, r"\end{longtable}", ""]
    return "\n".join(lines)


def quantity(value: float, format: str = ".4g") -> str:
    return printed(float(value), format)


def claims(numbers: Numbers, records: Records, tier: str, seconds: Mapping[str, float]) -> str:
    """Claim, rule, file, wall time, guard."""
    rows = []
    for claim in paper_claims.evidence(numbers, records, tier):
        taken = [value for name, value in seconds.items() if name.startswith(claim.benchmark)] if claim.benchmark else []
        total = sum(taken) if taken else claim.seconds
        rows.append([claim.text, rf"\texttt{{{escape(claim.rule)}}}", rf"\path{{{claim.file}}}", duration(total), claim.guard])
    paragraph = r">{\raggedright\arraybackslash}p"
    head = ["claim", "rule", "file", "time", "tolerance or test"]
    return tabular(rf"{paragraph}{{1.75in}} l {paragraph}{{1.9in}} r {paragraph}{{1.65in}}", head, rows)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return r"\undefinedvalue{}"
    return rf"\num{{{seconds:.0f}}}~s" if seconds < 120 else rf"\num{{{seconds / 60:.0f}}}~min"


def reported_table(reported: Mapping[str, Any]) -> str:
    """Figures of others, as text: they are quoted, not computed with."""
    rows: list[Sequence[str] | object] = []
    for row in reported["rows"]:
        name = escape(row["method"]) + (rf"~\citep{{{row['key']}}}" if row["key"] else "")
        rows += [RULE] if not row["key"] else []
        rows.append([name, *[escape(value) + (rf" ({escape(memory)})" if memory else "") for value, memory in row["values"]]])
    return tabular("l " + "r" * len(reported["columns"]), ["\\emph{reported}", *[escape(column) for column in reported["columns"]]], rows)


def machines(numbers: Numbers) -> str:
    """Where the runs of each experiment were made, and what they took."""
    rows = []
    for name, subject in subjects(numbers).items():
        for prefix in (name, f"{name}.live"):
            keys = ("tier_label", "machine", "torch", "runs", "wall", "energy")
            row = [subject, *(numbers.latex(f"{prefix}.{key}") for key in keys)]
            rows += [row] if row not in rows else []
    head = ["", "records", "machine", "PyTorch", "runs", "wall time", "energy"]
    return tabular(r"l l >{\raggedright\arraybackslash}p{1.5in} l r r >{\raggedright\arraybackslash}p{1.6in}", head, rows)

"""Sentences and table of the comparison of policies. Which words surround the numbers follows from their values."""

from __future__ import annotations

from paper_numbers import Numbers

LABELS = {
    "static": "Static",
    "uniform": "Uniform (COMP-AMS)",
    "heuristic": "Energy threshold",
    "rankschedule": "Rank schedule (AdaRankGrad)",
    "budget": "Exact budget",
    "tinyformer": "TinyFormer",
    "oracle": "Greedy oracle",
}


def sentences(numbers: Numbers) -> dict[str, str]:
    """Every sentence by its key; of a tier without the experiment, that it was not run."""
    if "policy.variants" not in numbers:
        absent = "Policies were not compared in the tier behind this copy."
        return {f"policy.{key}": absent for key in ("setup", "outcome", "behaviour", "imitation", "condition")}
    return {
        "policy.setup": setup(numbers),
        "policy.outcome": outcome(numbers),
        "policy.behaviour": behaviour(numbers),
        "policy.imitation": imitation(numbers),
        "policy.condition": condition(numbers),
    }


def label(name: str) -> str:
    return LABELS.get(name, name)


def setup(numbers: Numbers) -> str:
    runs = (
        r"The policies set the plans of \val{policy.runs} short runs in all (data: \val{policy.tasks}; budgets: \val{policy.budgets} bytes "
        r"of state per value of the matrices; \val{policy.seeds} seeds; \val{policy.steps} steps each). The learned policy was trained on "
        "the same kinds of data, with models of other widths and under other budgets."
    )
    exceeded = numbers["policy.exceeded"]
    return f"{runs} " + ("No run exceeded its budget." if exceeded == 0 else r"\textbf{\val{policy.exceeded} runs exceeded their budget.}")


def outcome(numbers: Numbers) -> str:
    rule = label(numbers["policy.best_rule"])
    low, high = numbers["policy.difference_low"], numbers["policy.difference_high"]
    text = (
        rf"The best rule is {rule}, with a hypervolume of \val{{policy.{numbers['policy.best_rule']}.volume}}; TinyFormer has "
        r"\val{policy.tinyformer.volume}"
    )
    if low is None:
        return f"{text}. From one seed no verdict is possible."
    text += (
        r", a difference of \val{policy.difference} (\val{policy.difference_low} to \val{policy.difference_high}, bootstrap over seeds)."
    )
    if high < 0.0:
        verdict = "The learned policy is worse than a simple rule here, and the rule is what we recommend."
    elif low > 0.0:
        verdict = "The learned policy is better than every rule here."
    else:
        verdict = "The interval contains zero: the learned policy is not told apart from the simple rule, which is cheaper to have."
    return f"{text} {verdict} " + (
        "The greedy oracle was not run in this tier." if numbers["policy.oracle"] is None else r"The greedy oracle has \val{policy.oracle}."
    )


def behaviour(numbers: Numbers) -> str:
    text = (
        r"Its decisions have a mean entropy of \val{policy.entropy} nats a layer, and in the last block the run's token gives "
        r"\val{policy.run_token} of its attention to itself."
    )
    if numbers["policy.curvature"] is None:
        return f"{text} It chose one rank throughout, so there is nothing to relate to curvature."
    return (
        text + r" The rank correlation between a layer's rank and the absolute trace of its Hessian's estimate is \val{policy.curvature}."
    )


def imitation(numbers: Numbers) -> str:
    if numbers["policy.agreement.budget"] is None:
        return "The policy file does not say how well it imitated its experts."
    return (
        r"Before it was improved by PPO the network was cloned from the exact budget. On episodes that it had not seen, a clone takes the "
        r"very action of its expert for \val{policy.agreement.budget} of the layers (exact budget), \val{policy.agreement.compams} "
        r"(COMP-AMS) and \val{policy.agreement.oracle} (greedy oracle, whose choices turn on differences of single steps)."
    )


def condition(numbers: Numbers) -> str:
    return (
        r"For the plans that TinyFormer chose, the largest step of \cref{thm:T7} for $L=\tilde L=1$ is "
        r"\val{policy.tinyformer.step_schedule}; for the contraction that it declares for every plan it may choose it is "
        r"\val{policy.tinyformer.step_declared}."
    )


def table(numbers: Numbers) -> str:
    """One row for each policy."""
    from paper_tables import tabular

    head = ["policy", "hypervolume", r"\SI{95}{\percent} interval", "regret", "log loss ratio", "state", "seconds"]
    rows = []
    for name in numbers.get("policy.variants", []):
        latex = {key: numbers.latex(f"policy.{name}.{key}") for key in ("volume", "low", "high", "regret", "loss", "memory", "seconds")}
        interval = f"{latex['low']} to {latex['high']}"
        rows.append([label(name), latex["volume"], interval, *(latex[key] for key in ("regret", "loss", "memory", "seconds"))])
    return tabular("l r r r r r r", head, rows or [["not run in this tier", *[""] * 6]])

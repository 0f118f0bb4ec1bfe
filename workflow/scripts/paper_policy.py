"""Sentences and table of the comparison of policies. Which words surround the numbers follows from their values."""

from __future__ import annotations

from paper_numbers import Numbers, printed

LABELS = {
    "static": "Static",
    "uniform": "Uniform (COMP-AMS)",
    "heuristic": "Energy threshold",
    "rankschedule": "AdaRankGrad's ranks",
    "budget": "Exact budget",
    "tinyformer": "TinyFormer",
    "lstm": "LSTM over layers",
    "cloned-tinyformer": "TinyFormer, cloned",
    "cloned-lstm": "LSTM, cloned",
    "scratch": "TinyFormer, PPO alone",
    "oracle": "Greedy oracle",
}


def sentences(numbers: Numbers) -> dict[str, str]:
    """Every sentence by its key; of a tier without the experiment, that it was not run."""
    if "policy.variants" not in numbers:
        absent = "Policies were not compared in the tier behind this copy."
        keys = ("setup", "outcome", "oracle", "ablations", "behaviour", "imitation", "condition", "caption")
        return {f"policy.{key}": absent for key in keys}
    return {
        "policy.setup": setup(numbers),
        "policy.outcome": outcome(numbers),
        "policy.oracle": oracle(numbers),
        "policy.ablations": ablations(numbers),
        "policy.behaviour": behaviour(numbers),
        "policy.imitation": imitation(numbers),
        "policy.condition": condition(numbers),
        "policy.caption": r"Runs: \val{policy.label}.",
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
    text = (
        rf"The best rule is {rule}, with a hypervolume of \val{{policy.{numbers['policy.best_rule']}.volume}}; TinyFormer has "
        r"\val{policy.tinyformer.volume}"
    )
    if numbers["policy.difference_low"] is None:
        return f"{text}. From one seed no verdict is possible."
    text += (
        r", a difference of \val{policy.difference} (\val{policy.difference_low} to \val{policy.difference_high}, bootstrap over seeds)."
    )
    verdict = {
        -1: "The learned policy is worse than a simple rule here, and the rule is what we recommend.",
        0: "The interval contains zero: the learned policy is not told apart from the simple rule, which is cheaper to have.",
        1: "The learned policy is better than every rule here.",
    }
    return f"{text} {verdict[sign(numbers, 'policy.difference')]}"


def sign(numbers: Numbers, key: str) -> int:
    """Of a difference: 0 where its interval contains zero, or where there is none."""
    low, high = numbers[f"{key}_low"], numbers[f"{key}_high"]
    return 0 if low is None or low <= 0.0 <= high else 1 if low > 0.0 else -1


def oracle(numbers: Numbers) -> str:
    if numbers["policy.oracle"] is None:
        return "The greedy oracle, which tries each plan of each layer for a step before it chooses, was not run in this tier."
    text = (
        r"The greedy oracle, which tries each plan of each layer for a step before it chooses, has a hypervolume of \val{policy.oracle}; "
        r"where it was run TinyFormer has \val{policy.tinyformer.of_oracle} times as much, and its regret to the oracle is "
        r"\val{policy.tinyformer.behind}"
    )
    if numbers["policy.tinyformer.behind"] < 0.0:
        return f"{text}: it is negative, as an oracle that looks one step ahead is no bound."
    return f"{text}."


def ablations(numbers: Numbers) -> str:
    parts = []
    for key, what in (("imitation", "PPO from random weights"), ("ppo", "imitation without PPO"), ("lstm", "the LSTM")):
        if f"policy.adds.{key}" in numbers:
            verdict = {-1: "behind", 0: "not told apart from", 1: "ahead of"}[sign(numbers, f"policy.adds.{key}")]
            parts.append(rf"{verdict} {what} (\val{{policy.adds.{key}}}, \val{{policy.adds.{key}_low}} to \val{{policy.adds.{key}_high}})")
    text = f"In hypervolume TinyFormer is {', '.join(parts)}." if parts else "No other learned policy was judged in this tier."
    pairs = [
        ("low-rank", "full-rank", "the exact budget with the low-rank stage", "without it"),
        ("error-codec", "error-gradient", "an error kept in four bits", "in single precision"),
    ]
    for one, other, first, second in pairs:
        if {f"{name} budget" for name in (one, other)} <= set(numbers["policy.ablations"]):
            text += (
                rf" Under \val{{policy.ablation.{one}.budget.budgets}} bytes a value {first} earns "
                rf"\val{{policy.ablation.{one}.budget.reward}}, {second} \val{{policy.ablation.{other}.budget.reward}}."
            )
    return text


def behaviour(numbers: Numbers) -> str:
    text = (
        r"Its decisions have a mean entropy of \val{policy.entropy} nats a layer. In the last block the run's token gives "
        r"\val{policy.run_token} of its attention to itself, and the layer that is looked at most gets \val{policy.uneven} times an even "
        r"share. It takes the very action of the exact budget for \val{policy.tinyformer.as_budget} of the layers of held-out tasks."
    )
    if numbers["policy.curvature"] is None:
        return f"{text} It chose one rank throughout, so there is nothing to relate to curvature."
    return (
        text + r" The rank correlation between a layer's rank and the absolute trace of its Hessian's estimate is \val{policy.curvature}."
    )


def imitation(numbers: Numbers) -> str:
    """How the learned policy came to be: which expert it was cloned from and why, how well that went, and what PPO added."""
    best, experts = numbers["policy.expert"], numbers["policy.experts"]
    earned = ", ".join(rf"{label(name)} \val{{policy.expert.{name}.return}}" for name in experts if name != "oracle")
    agreement = ", ".join(rf"{label(name)} \val{{policy.expert.{name}.agreement}}" for name in experts)
    text = rf"On \val{{policy.experts.runs}} training runs the rules earned so much: {earned}. "
    if "oracle" in experts:
        text += (
            r"The greedy oracle earned \val{policy.expert.oracle.return} on the \val{policy.expert.oracle.runs} of them that it was "
            r"recorded on, and the best rule \val{policy.expert.oracle.best_rule} there. "
        )
    text += (
        rf"So the network was cloned from {label(best)}. What proximal policy optimisation made of the clone earned "
        r"\val{policy.improved.ppo} on \val{policy.improved.runs} such runs, and the clone \val{policy.improved.clone}: "
    )
    text += "it was kept." if numbers["policy.improved.kept"] == "ppo" else "the clone is what is shipped and judged as TinyFormer."
    text += f" On episodes that it had not seen, a clone takes the very action of its expert for so many of the layers: {agreement}."
    if numbers.get("policy.expert.oracle.agreement", 1.0) < 0.9:
        text += (
            " The rules are functions of what the policy sees. The oracle's choices are not: even though a plan stays in force unless "
            "several draws of batches tell a better one apart, they turn on the draws."
        )
    return (
        rf"{text} Over the policies of the comparison, the reward that they are trained on and the hypervolume have a rank correlation of "
        r"\val{policy.orders}."
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

    head = ["policy", "volume", r"\SI{95}{\percent} interval", "regret", "to oracle", "log loss", "state", "seconds"]
    rows = []
    for name in numbers.get("policy.variants", []):
        keys = ("volume", "low", "high", "regret", "behind", "loss", "memory", "seconds")
        latex = {key: numbers.latex(f"policy.{name}.{key}") for key in keys}
        rows.append([label(name), latex["volume"], interval(latex["low"], latex["high"]), *(latex[key] for key in keys[3:])])
    return tabular("l r r r r r r r", head, rows or [["not run in this tier", *[""] * 7]])


def interval(low: str, high: str) -> str:
    """As it is printed; of a single seed there is none, and both ends are the same dash."""
    return low if low == high == printed(None, "") else f"{low} to {high}"


CHANGES = {
    "low-rank": "ranks up to one half",
    "full-rank": "no low-rank stage",
    "error-none": "no error feedback",
    "error-codec": "error in four bits",
    "error-gradient": "error, full precision",
}


def ablation_table(numbers: Numbers) -> str:
    """One row for each policy of each ablation."""
    from paper_tables import tabular

    head = ["changed", "policy", "budgets", "reward", r"\SI{95}{\percent} interval", "log loss", "state", "seconds"]
    rows = []
    for ablation in numbers.get("policy.ablations", []):
        change, _, name = ablation.partition(" ")
        keys = ("budgets", "reward", "reward_low", "reward_high", "loss", "memory", "seconds")
        latex = {key: numbers.latex(f"policy.ablation.{change}.{name}.{key}") for key in keys}
        first = [CHANGES.get(change, change), label(name), latex["budgets"], latex["reward"]]
        rows.append([*first, interval(latex["reward_low"], latex["reward_high"]), *(latex[key] for key in keys[4:])])
    return tabular("l l r r r r r r", head, rows or [["not run in this tier", *[""] * 7]])

"""What the LLaMA notebook adds: perplexities, every byte that training holds, and tests paired over seeds."""

from __future__ import annotations

from pathlib import Path

import common
import matplotlib.pyplot as plt
import numpy as np
from common import Numbers, RunSet
from experiment import controls, final_losses, group, headline, ordered, spread, table
from figures import Looks
from matplotlib.figure import Figure

from mango.training import judge

HELD = ("parameters", "gradients", "optimizer_state")  # categories of the ledger: weights with factors and scales, gradients, state


def held(runs: RunSet, name: str) -> dict[str, float]:
    """Bytes by category and in all, each per parameter of the model without factors."""
    found = {key: float(np.mean([getattr(run.memory, key) / run.parameters.total for run in runs.runs[name]])) for key in HELD}
    return found | {"total": sum(found.values())}


def quantised(runs: RunSet) -> str | None:
    """The variant with factors beside a four-bit base."""
    return next((name for name in ordered(runs) if (lora := runs.runs[name][0].config.lora) is not None and lora.base == "nf4"), None)


def best_peer(runs: RunSet) -> str | None:
    """Of the methods that are not Mango, dense training among them, the one with the lowest mean test loss."""
    rows = table(runs)
    peers = [str(name) for name in rows.index if group(runs, str(name)) == "peer" or name == controls(runs)[0]]
    return min(peers, key=lambda name: rows.loc[name, "loss"], default=None)


def sentiment(results: Path, tier: str) -> RunSet | None:
    """The best runs of ``llama-sentiment``; None where neither the tier nor an archive has one."""
    try:
        return common.run_sets(results, tier, "llama-sentiment")[0]
    except FileNotFoundError:
        return None


def chance(runs: RunSet) -> tuple[float, float]:
    """The share of the test split's larger class, which a constant answer reaches, and the standard deviation of guesses."""
    shares = [run.data.majority for run in runs.every()]
    share = max(each for each in shares if each is not None)
    return share, float(np.sqrt(share * (1 - share) / min(run.data.test for run in runs.every())))


def draw_held(runs: RunSet, look: Looks) -> Figure:
    """Test loss against every byte that training holds beside activations."""
    rows = table(runs)
    figure, axis = plt.subplots(figsize=(common.TEXT_WIDTH, 3.2))
    for name in ordered(runs):
        marker = {**look[name], "linestyle": "none", "markersize": 5, "capsize": 2, "elinewidth": 0.7}
        axis.errorbar(
            held(runs, name)["total"],
            rows.loc[name, "loss"],
            yerr=rows.loc[name, "loss_std"] or 0.0,
            label=rows.loc[name, "label"],
            **marker,
        )
    axis.set(xlabel="weights, gradients and optimizer state (bytes per parameter)", ylabel="test loss")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def report(runs: RunSet, prefix: str, numbers: Numbers) -> None:
    """Beside what ``report.report`` says of the same experiment."""

    def add(key: str, value: object, format: str = "text") -> None:
        numbers.add(f"{prefix}.{key}", value, format, tier=runs.tier)

    add("unit", runs.common(lambda run: run.throughput.unit.removesuffix("s/s")))
    add("quantised", quantised(runs))
    for name in ordered(runs):
        perplexities = [float(np.exp(loss)) for loss in final_losses(runs, name).values()]
        add(f"{name}.perplexity", float(np.mean(perplexities)), ".3f")
        add(f"{name}.perplexity_std", spread(perplexities), ".3f")
        for key, value in held(runs, name).items():
            add(f"{name}.held.{key}", value, ".2f")
    for rival, name in {"peer": best_peer(runs), "quantised": quantised(runs)}.items():
        ours = headline(runs)
        if name is None or ours is None:
            add(f"{rival}.name", None)
            continue
        test = judge.paired(final_losses(runs, ours), final_losses(runs, name))
        low, high = test.interval or (None, None)
        add(f"{rival}.name", name)
        add(f"{rival}.difference", test.difference, "+.3f")
        add(f"{rival}.low", low, "+.3f")
        add(f"{rival}.high", high, "+.3f")
        add(f"{rival}.p", test.p_value, ".2g")
        add(f"{rival}.pairs", test.pairs, "d")


def report_sentiment(runs: RunSet, prefix: str, numbers: Numbers) -> None:
    """Beside what ``report.report`` says of the same experiment."""
    for key, value in zip(("chance", "chance_std"), chance(runs), strict=True):
        numbers.add(f"{prefix}.{key}", value, ".1%", tier=runs.tier)

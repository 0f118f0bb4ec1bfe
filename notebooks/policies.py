"""Evaluations of policies: which is the best there is, hypervolumes, regret to the field and to the oracle, and what ablations change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import torch

from mango.policy.evaluate import bootstrap, hypervolume

COSTS = ("loss", "memory", "seconds", "joules")
MARGIN = 1.1  # the reference point, in units of the field's range, so that the extremes count too
KEY = ["task", "budget", "seed"]


@dataclass(frozen=True)
class Evaluation:
    """What one tier's rule ``policy_evaluation`` wrote, live or archived."""

    tier: str
    archive: str
    record: dict[str, Any]

    @property
    def label(self) -> str:
        return f"archived {self.tier} ({self.archive})" if self.archive else f"live {self.tier}"

    @property
    def runs(self) -> pd.DataFrame:
        """The comparison itself."""
        frame = self.every()
        return frame[frame["ablation"] == ""]

    def every(self) -> pd.DataFrame:
        """Ablations too."""
        return pd.DataFrame(self.record["runs"])

    def costs(self) -> list[str]:
        """Those that were measured in every run."""
        return [name for name in COSTS if self.runs[name].notna().all()]


def evaluations(results: Path, tier: str) -> list[Evaluation]:
    """Best first: higher tiers before lower, then newer archives before older, the live one last. Raises: FileNotFoundError."""
    live = results / tier / "policy" / "evaluation.json"
    archived = [(path.relative_to(results / "archive").parts[0], path) for path in (results / "archive").glob("*/policy/evaluation.json")]
    found = [(name, json.loads(path.read_text())) for name, path in [*archived, ("", live)] if path.is_file()]
    if not found:
        raise FileNotFoundError(f"no evaluation of policies: {live}")
    rank = {name: place for place, name in enumerate(common.TIERS)}
    order = sorted(found, key=lambda item: (rank.get(item[1]["tier"], -1), item[0][-7:]), reverse=True)
    return [Evaluation(record["tier"], archive, record) for archive, record in order]


def volumes(runs: pd.DataFrame, costs: Sequence[str]) -> dict[str, pd.Series]:
    """Policy -> hypervolume by seed, mean over the tasks.

    A task's volume is that of all of a seed's budgets together; each cost is scaled to [0, 1] by the field's extremes on that task.
    """
    rows = []
    for task, group in runs.groupby("task"):
        low, high = group[list(costs)].min(), group[list(costs)].max()
        scaled = (group[list(costs)] - low) / (high - low)
        for (name, seed), part in group.groupby(["policy", "seed"]):
            points = torch.tensor(scaled.loc[part.index].to_numpy())
            rows.append((task, name, seed, hypervolume(points, torch.full((len(costs),), MARGIN).double())))
    frame = pd.DataFrame(rows, columns=["task", "policy", "seed", "volume"])
    return {name: group.groupby("seed")["volume"].mean() for name, group in frame.groupby("policy")}


def regrets(runs: pd.DataFrame, mark: str | None = None) -> dict[str, float]:
    """Policy -> how much less reward than the mark earned on the same task, budget and seed; mean over where the mark was run.

    Args:
        mark: a policy; None = the best of the field each time.
    """
    best = (runs if mark is None else runs[runs["policy"] == mark]).groupby(KEY)["reward"].max().rename("best")
    joined = runs.join(best, on=KEY)
    joined["regret"] = joined["best"] - joined["reward"]
    return {name: float(regret) for name, regret in joined.groupby("policy")["regret"].mean().items()}


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """By the bootstrap over seeds; of one seed there is none."""
    return bootstrap(values) if len(values) > 1 else (None, None)


def changed(frame: pd.DataFrame, ablation: str, policy: str, column: str) -> list[float]:
    """A column of an ablation's runs of a policy: mean for each seed."""
    rows = frame[(frame["ablation"] == ablation) & (frame["policy"] == policy)]
    return rows.groupby("seed")[column].mean().tolist()


def attention(decisions: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """(names of the tokens, who looks at whom in the last block) of the task with the most layers, mean over its decisions."""
    wide = max(decisions["layers"], key=len)
    rows = decisions[decisions["layers"].map(lambda names: names == wide)]
    short = [".".join(name.removesuffix(".weight").split(".")[-2:]) for name in wide]
    return ["run", *short], np.mean([np.array(one) for one in rows["attention"]], axis=0)

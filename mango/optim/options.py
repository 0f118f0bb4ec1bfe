"""The options of one of Mango's parameter groups: what is legal, and which plan they give a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mango.errors import ConfigError
from mango.optim.plan import LayerPlan

MATMUL = ("auto", "float32", "bfloat16", "int8")


def plan_of(group: Mapping[str, Any], number: int | None = None) -> LayerPlan | None:
    """What a group asks for, or what is in force for its parameter of that number."""
    plan = group["plan"] if number is None else group.get("plans", {}).get(number, group["plan"])
    return None if plan is None else LayerPlan.of(plan)


def validate(group: dict[str, Any]) -> None:
    """Raises: ConfigError for an option that is not legal."""
    lr, betas, eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if not 0.0 <= float(lr) < float("inf"):
        raise ConfigError.of("lr", lr, "a finite number >= 0")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError.of("betas", betas, "two numbers in [0, 1)")
    if not 0.0 <= eps < float("inf"):
        raise ConfigError.of("eps", eps, "a finite number >= 0")
    if not 0.0 <= decay < float("inf"):
        raise ConfigError.of("weight_decay", decay, "a finite number >= 0")
    if group["matmul"] not in MATMUL:
        raise ConfigError.of("matmul", group["matmul"], "one of " + ", ".join(MATMUL))
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], int) or group["seed"] < 0:
        raise ConfigError.of("seed", group["seed"], "an integer >= 0")

"""The options of one of Mango's parameter groups: what is legal, and which plan they give a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mango.errors import ConfigError
from mango.optim.plan import LayerPlan, applied

MATMUL = ("auto", "float32", "bfloat16", "int8")


def plan_of(group: Mapping[str, Any]) -> LayerPlan | None:
    """What a group asks for; None = plain AdamW."""
    return None if group["plan"] is None else LayerPlan.of(group["plan"])


def asked(group: Mapping[str, Any], name: str, shape: Sequence[int]) -> LayerPlan | None:
    """What a group asks for, for a parameter of this name and shape."""
    return applied(plan_of(group), name, shape)


def in_force(group: Mapping[str, Any], number: int, name: str, shape: Sequence[int]) -> LayerPlan | None:
    """The plan of a group's parameter of this number: what ``set_plan`` made of the one that the group asks for."""
    changed = group.get("plans", {})
    if number not in changed:
        return asked(group, name, shape)
    return None if changed[number] is None else LayerPlan.of(changed[number])


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

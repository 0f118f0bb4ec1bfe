"""Observation -> plan per layer: rules, the exact choice under a budget, and a learned policy with what trains and judges it.

``Mango(params, policy="tinyformer", memory_budget="0.5 bytes/param")`` puts one to work.
"""

from __future__ import annotations

from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

from mango.registry import Registry

if TYPE_CHECKING:
    from mango.policy import imitation as imitation
    from mango.policy import ppo as ppo
    from mango.policy import scalarize as scalarize
    from mango.policy.base import Policy
    from mango.policy.budget import Budget
    from mango.policy.controller import Controller
    from mango.policy.rules import Heuristic, Static
    from mango.policy.tinyformer import TinyFormer

__all__ = ["REGISTRY", "Budget", "Heuristic", "Static", "TinyFormer", "controller_for", "imitation", "ppo", "scalarize"]

_HOME = {
    "Budget": "mango.policy.budget",
    "Heuristic": "mango.policy.rules",
    "Static": "mango.policy.rules",
    "TinyFormer": "mango.policy.tinyformer",
}
REGISTRY = Registry(
    "policy",
    {
        "static": "mango.policy.rules:Static",
        "uniform": "mango.policy.rules:Uniform",
        "heuristic": "mango.policy.rules:Heuristic",
        "rankschedule": "mango.policy.rules:RankSchedule",
        "budget": "mango.policy.budget:Budget",
        "tinyformer": "mango.policy.store:tinyformer",
        "lstm": "mango.policy.store:lstm",
    },
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mango.policy' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name) if name in _HOME else import_module(f"mango.policy.{name}")


def controller_for(policy: Policy | str, every: int, budget: int | float | str | None, shapes: dict[str, tuple[int, ...]]) -> Controller:
    """What puts a policy, or the registered one of this name, to work in an optimizer over parameters of these shapes.

    Raises: ConfigError for an unknown name, or options that are not legal.
    """
    from mango.policy.budget import parse_budget
    from mango.policy.controller import Controller, torch_defaults

    limit = None if budget is None else parse_budget(budget, sum(map(prod, shapes.values())), field="memory_budget")
    with torch_defaults():
        return Controller(REGISTRY.get(policy) if isinstance(policy, str) else policy, every, limit)

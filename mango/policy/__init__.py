"""Observation -> plan per layer. So far: the exact choice under a memory budget, and scalarisations of several objectives into one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mango.policy import scalarize
    from mango.policy.budget import Budget

__all__ = ["Budget", "scalarize"]

_HOME = {"Budget": "mango.policy.budget"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mango.policy' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name) if name in _HOME else import_module(f"mango.policy.{name}")

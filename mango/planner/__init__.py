"""What a training run needs, by category, before anything is allocated: ``plan("llama7b", gpu="rtx5090", seq=2048).rows``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mango.planner.gpus import GPUS
    from mango.planner.report import Report, plan
    from mango.planner.targets import Target, target

__all__ = ["GPUS", "Report", "Target", "plan", "target"]

_HOME = {"GPUS": "gpus", "Report": "report", "Target": "targets", "plan": "report", "target": "targets"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mango.planner' has no attribute {name!r}")
    return getattr(import_module(f"mango.planner.{_HOME[name]}"), name)

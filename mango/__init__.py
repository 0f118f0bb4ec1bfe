"""mango: train large models in little memory with low-rank, quantised gradients and certified bounds.

``import mango`` needs torch and numpy alone; everything else is an extra, imported where it is used. Names are imported on first use
(PEP 562), so that ``mango --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mango import codecs, compressors, errors, feedback, mole, optim
    from mango.optim.groups import MuonMango, param_groups
    from mango.optim.mango import Mango
    from mango.optim.plan import LayerPlan
    from mango.orthonormal import orthonormalize
    from mango.subspace import Subspace

__version__ = "0.1.0"

_HOME = {
    "LayerPlan": "mango.optim.plan",
    "Mango": "mango.optim.mango",
    "MuonMango": "mango.optim.groups",
    "Subspace": "mango.subspace",
    "orthonormalize": "mango.orthonormal",
    "param_groups": "mango.optim.groups",
}
__all__ = [
    "LayerPlan",
    "Mango",
    "MuonMango",
    "Subspace",
    "codecs",
    "compressors",
    "errors",
    "feedback",
    "mole",
    "optim",
    "orthonormalize",
    "param_groups",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mango' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name) if name in _HOME else import_module(f"mango.{name}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

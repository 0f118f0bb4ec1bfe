"""Compressed communication that converges: EF21, MARINA and their relatives, robust aggregation, attacks.

``estimate = EF21(TopK(k=32)).step(gradients)`` with one gradient per worker; across processes, each rank calls ``message`` and ``absorb``.
"""

from mango.feedback.base import Feedback
from mango.feedback.ef21 import EF21, EF21SGDM
from mango.feedback.marina import ByzVRMarina, Marina, VRMarina
from mango.registry import Registry

REGISTRY = Registry(
    "feedback",
    {
        "ef21": "mango.feedback.ef21:EF21",
        "ef21sgdm": "mango.feedback.ef21:EF21SGDM",
        "marina": "mango.feedback.marina:Marina",
        "vrmarina": "mango.feedback.marina:VRMarina",
        "byzvrmarina": "mango.feedback.marina:ByzVRMarina",
    },
)
get = REGISTRY.get

__all__ = ["EF21", "EF21SGDM", "REGISTRY", "ByzVRMarina", "Feedback", "Marina", "VRMarina", "get"]

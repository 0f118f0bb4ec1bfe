"""What dishonest workers send. Attackers are the last rows of the messages, know everything and act together.

``attack(messages)`` takes the messages that all n workers would send by the protocol, (n, d), and returns what the server receives. Pass
one as ``attack=`` to ``step`` or ``absorb`` of the methods in mango.feedback.marina to study it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from mango.errors import ConfigError
from mango.registry import Registry

REGISTRY = Registry(
    "attack",
    {
        "signflip": "mango.feedback.attacks:SignFlip",
        "ipm": "mango.feedback.attacks:InnerProduct",
        "alie": "mango.feedback.attacks:LittleIsEnough",
        "labelflip": "mango.feedback.attacks:LabelFlip",
        "nan": "mango.feedback.attacks:NaN",
    },
)
get = REGISTRY.get


class Attack(ABC):
    """Args:
    attackers: how many of the workers, the last ones, are hostile; at least 1.
    """

    name: ClassVar[str]

    def __init__(self, attackers: int) -> None:
        if attackers < 1:
            raise ConfigError.of("attackers", attackers, "an integer >= 1")
        self.attackers = attackers

    def __call__(self, messages: Tensor) -> Tensor:
        """(n, d) -> (n, d): the honest rows as they are, the attackers' replaced.

        Raises:
            ConfigError: no honest worker is left.
        """
        if messages.ndim != 2 or len(messages) <= self.attackers:
            raise ConfigError.of("messages", tuple(messages.shape), f"(n, d) with n > attackers = {self.attackers}")
        honest, own = messages[: -self.attackers], messages[-self.attackers :]
        return torch.cat([honest, self._forge(honest, own).to(messages.dtype)])

    def labels(self, y: Tensor) -> Tensor:
        """The labels that an attacker trains on, from the true ones; the true ones unless the attack poisons data."""
        return y

    @abstractmethod
    def _forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """(G, d) honest messages and (f, d) the attackers' own by the protocol -> (f, d)."""


class SignFlip(Attack):
    """-scale times what the protocol asks for. At scale > G/f even the sign of the mean is the attackers'."""

    name: ClassVar[str] = "signflip"

    def __init__(self, attackers: int, scale: float = 4.0) -> None:
        super().__init__(attackers)
        self.scale = scale

    def _forge(self, honest: Tensor, own: Tensor) -> Tensor:
        return -self.scale * own


class InnerProduct(Attack):
    """Inner-product manipulation: every attacker sends -epsilon times the honest mean.

    Source: Xie, Koyejo, Gupta 2019, arXiv:1903.03936. Small epsilon slows the mean down; epsilon > G/f turns it round.
    """

    name: ClassVar[str] = "ipm"

    def __init__(self, attackers: int, epsilon: float = 4.0) -> None:
        super().__init__(attackers)
        self.epsilon = epsilon

    def _forge(self, honest: Tensor, own: Tensor) -> Tensor:
        return (-self.epsilon * honest.mean(0)).expand_as(own)


class LittleIsEnough(Attack):
    """A little is enough: the honest mean minus z standard deviations per coordinate.

    Source: Baruch, Baruch, Goldberg 2019, arXiv:1902.06156. Their z is a normal quantile (0 for 2 of 8 workers, about 1.5 for many), which
    hides in the noise of plain SGD. Under variance reduction that noise vanishes and even the plain mean survives it; the default is
    strong enough to break the mean.
    """

    name: ClassVar[str] = "alie"

    def __init__(self, attackers: int, z: float = 10.0) -> None:
        super().__init__(attackers)
        self.z = z

    def _forge(self, honest: Tensor, own: Tensor) -> Tensor:
        return (honest.mean(0) - self.z * honest.std(0, correction=0)).expand_as(own)


class LabelFlip(Attack):
    """The protocol, followed on wrong labels: signs (-1, 1) are negated, classes 0 ... K-1 are counted from the other end."""

    name: ClassVar[str] = "labelflip"

    def __init__(self, attackers: int, classes: int | None = None) -> None:
        super().__init__(attackers)
        if classes is not None and classes < 2:
            raise ConfigError.of("classes", classes, "an integer >= 2, or None for labels -1 and 1")
        self.classes = classes

    def labels(self, y: Tensor) -> Tensor:
        return -y if self.classes is None else self.classes - 1 - y

    def _forge(self, honest: Tensor, own: Tensor) -> Tensor:
        return own


class NaN(Attack):
    """Not a number in every coordinate: what a broken worker sends."""

    name: ClassVar[str] = "nan"

    def _forge(self, honest: Tensor, own: Tensor) -> Tensor:
        return torch.full_like(own, torch.nan)

"""What ``memory_budget`` promises: plans whose state, and with a ledger everything that it counts, stays within a number of bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes
from mango.optim.plan import LayerPlan

if TYPE_CHECKING:
    from mango.optim.planned import Planned
    from mango.telemetry import MemoryLedger


class StateBudget:
    """The budget of one optimizer.

    Args:
        value: as ``mango.policy.budget.parse_budget`` takes it.
        ledger: None: the budget is of the optimizer's state. Otherwise it is of the sum of the state, the weights and buffers of the
            ledger's model, the gradients (of all trainable parameters; of the largest one where the backward pass frees them), and the
            most activations that the ledger has seen saved so far. What a step needs for itself is not counted (``mango plan`` computes
            it): on a card it takes the place of activations, which are gone by then, unless the backward pass steps.

    Attributes:
        limit: bytes of state that were allowed when plans were chosen last.
    """

    def __init__(self, value: int | float | str, ledger: MemoryLedger | None) -> None:
        self.value, self.ledger = value, ledger
        self.limit = 0
        self._counted: set[Tensor] = set()
        self._activations = 0

    def stale(self, params: Iterable[Tensor]) -> bool:
        """Whether activations have grown, or one of these parameters, which are about to be stepped, was not counted."""
        grown = self.ledger is not None and self.ledger.saved_activations > self._activations
        return grown or not self._counted.issuperset(params)

    def choose(self, optimizer: Planned) -> dict[Tensor, LayerPlan]:
        """The best plans for the parameters that have state or require a gradient. Raises: ConfigError when nothing fits."""
        from mango.policy.budget import parse_budget, plans_for_shapes  # which counts bytes by this package's parts

        counted = {place.name: param for param, place in optimizer._places.items() if param.requires_grad or optimizer.state.get(param)}
        plain = {name for name, param in counted.items() if optimizer.own_plans().get(name) is None}
        held = self._held(counted.values(), fused=optimizer._fused is not None)
        shapes = {name: tuple(param.shape) for name, param in counted.items()}
        chosen = plans_for_shapes(shapes, self.value, plain=plain, field="memory_budget", held=held)
        self.limit = parse_budget(self.value, sum(param.numel() for param in counted.values()), "memory_budget") - held
        self._counted = set(counted.values())
        self._activations = self.ledger.saved_activations if self.ledger is not None else 0
        return {counted[name]: plan for name, plan in chosen.items()}

    def admit(self, optimizer: Planned, param: Tensor, plan: LayerPlan | None) -> None:
        """Raises: ConfigError for a change of one plan that would exceed the budget."""
        planned = sum(
            layer_nbytes(other.shape, plan if other is param else optimizer._places[other].plan) for other in self._counted | {param}
        )
        if planned > self.limit:
            legal = f"one with which the state stays within the {self.limit} bytes that memory_budget leaves for it, not {planned}"
            raise ConfigError.of(f"plan of {optimizer._places[param].name}", plan, legal)

    def _held(self, params: Iterable[Tensor], fused: bool) -> int:
        """Bytes of the budget that are not state."""
        if self.ledger is None:
            return 0
        gradients = [param.nbytes for param in params if param.requires_grad]
        return self.ledger.parameters() + (max(gradients, default=0) if fused else sum(gradients)) + self.ledger.saved_activations

"""What the optimizers of this package share beside torch's own class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, evaluated with gradients as every ``step`` begins; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@runtime_checkable
class Observable(Protocol):
    """An optimizer that certifies its compression, such as ``mango.Mango``."""

    def observe(self, on: bool = True) -> None: ...

    def diagnostics(self) -> dict[str, dict[str, float]]: ...


class KeepsTypes(torch.optim.Optimizer):
    """An optimizer whose saved state comes back bit for bit: torch's own method would cast float32 moments to the parameters' type."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state."""
        super().load_state_dict({**state_dict, "state": {}})
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            if number in state_dict["state"]:
                saved = state_dict["state"][number].items()
                self.state[param] = {key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value for key, value in saved}

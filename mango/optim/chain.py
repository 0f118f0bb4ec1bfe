"""Several optimizers behind one: each steps its own parameters, convolutions folded to matrices where a method wants matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mango.optim.base import loss_of
from mango.products import without_autocast


@dataclass(frozen=True)
class Part:
    """One optimizer of a chain.

    Attributes:
        factory: parameter groups -> optimizer.
        groups: parameter groups as torch takes them, with plain parameters.
        fold: show tensors of more than two dimensions to the optimizer as matrices (shape[0], product of the rest).
    """

    factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    groups: list[dict[str, Any]]
    fold: bool = False


class Chain(torch.optim.Optimizer):
    """Steps every part with its own optimizer. Options set on ``param_groups`` (a scheduler's rate) reach the parts at the next step.

    Args:
        parts: in the order in which they step; parts without parameters are left out.

    Attributes:
        members: the optimizers, whose state this one saves, loads and counts.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.members: list[torch.optim.Optimizer] = []
        groups: list[dict[str, Any]] = []
        self._pairs: list[list[tuple[Tensor, Tensor]]] = []  # of each member: (parameter, what the member sees)
        for part in parts:
            if not any(group["params"] for group in part.groups):
                continue
            pairs, inner = [], []
            for group in part.groups:
                seen = [self._fold(param) if part.fold else param for param in group["params"]]
                pairs += list(zip(group["params"], seen, strict=True))
                inner.append({**group, "params": seen})
            member = part.factory(inner)
            self.members.append(member)
            self._pairs.append(pairs)
            groups += [
                {**options, "params": list(group["params"])} for options, group in zip(member.param_groups, part.groups, strict=True)
            ]
        super().__init__(groups, {})

    @staticmethod
    def _fold(param: Tensor) -> Tensor:
        return torch.nn.Parameter(param.detach().flatten(1)) if param.ndim > 2 else param

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part. Returns the closure's loss, if there is a closure."""
        loss = loss_of(closure)
        self._pass_options()
        for member, pairs in zip(self.members, self._pairs, strict=True):
            folded = [(param, seen) for param, seen in pairs if seen is not param]
            for param, seen in folded:
                seen.data = param.detach().flatten(1)  # again at each step: the parameter may have moved, or have strides of its own
                seen.grad = None if param.grad is None else param.grad.flatten(1)
            with without_autocast(pairs[0][0]):
                member.step()
            for param, seen in folded:
                if seen.grad is not None and seen.data_ptr() != param.data_ptr():  # flatten had to copy
                    param.copy_(seen.view(param.shape))
                seen.grad = None
                seen.data = seen.data if seen.data_ptr() == param.data_ptr() else seen.data.new_empty(0)
        return loss

    def _pass_options(self) -> None:
        inner = [group for member in self.members for group in member.param_groups]
        for own, group in zip(self.param_groups, inner, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})

    def state_dict(self) -> dict[str, Any]:
        """The members' states, and the groups as torch has them."""
        self._pass_options()
        return {"members": [member.state_dict() for member in self.members], "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member, pairs, state in zip(self.members, self._pairs, state_dict["members"], strict=True):
            for param, seen in pairs:
                if seen is not param:
                    seen.data = param.detach().flatten(1)
            member.load_state_dict(state)
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({key: value for key, value in saved.items() if key != "params"})

"""Which plan each matrix has: asked for by its group, chosen under a budget, or set one by one; and what a change does to its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes
from mango.optim.budgeted import StateBudget
from mango.optim.convert import convert
from mango.optim.options import asked, in_force
from mango.optim.plan import LayerPlan, is_matrix, matrix_count, matrix_shape
from mango.optim.stacks import Place, Stacks

if TYPE_CHECKING:
    from mango.optim.fused import FusedBackward
    from mango.policy.controller import Controller


class Planned(torch.optim.Optimizer):
    """The part of Mango that knows its matrices' plans."""

    _places: dict[Tensor, Place]
    _stacks: Stacks
    _budget: StateBudget | None
    _controller: Controller | None
    _fused: FusedBackward | None

    def plans(self) -> dict[str, LayerPlan | None]:
        """The plan in force of every parameter that is large enough for one, by name; None = plain AdamW."""
        return {place.name: place.plan for param, place in self._places.items() if is_matrix(param.shape)}

    def own_plans(self) -> dict[str, LayerPlan | None]:
        """The plans that the groups ask for, whatever ``set_plan`` or a policy made of them."""
        matrices = {param: place for param, place in self._places.items() if is_matrix(param.shape)}
        return {place.name: asked(place.group, place.name, param.shape) for param, place in matrices.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by name."""
        return {place.name: tuple(param.shape) for param, place in self._places.items()}

    @torch.no_grad()
    def set_plan(self, which: str | Tensor, plan: LayerPlan | Mapping[str, Any] | None) -> None:
        """Another plan for one matrix from the next step on. Its state is converted at once (see ``mango.optim.convert`` for what that
        drops); a plan equal to the one in force changes nothing. ``state_dict`` keeps it, ``replan`` chooses anew.

        Args:
            which: the name, as in ``plans()``, or the parameter.
            plan: a LayerPlan, a mapping of its fields, or None for plain AdamW.

        Raises: ConfigError for a parameter that is not this optimizer's or too small for a plan, or a plan that does not fit it
            or the memory budget.
        """
        matrices = {place.name: param for param, place in self._places.items() if is_matrix(param.shape)}
        param = matrices.get(which) if isinstance(which, str) else which
        if param is None or param not in self._places or not is_matrix(param.shape):
            shown = which if isinstance(which, str) else f"a tensor of shape {tuple(which.shape)}"
            raise ConfigError.of("which", shown, "one of the matrices " + ", ".join(matrices))
        place, new = self._places[param], None if plan is None else LayerPlan.of(plan)
        if new is not None:
            new.columns(*matrix_shape(param.shape), place.name)
        if self._budget is not None and new != place.plan:
            self._budget.admit(self, param, new)
        self._set_plan(param, new)

    @torch.no_grad()
    def replan(self, memory_budget: int | float | str | None = None) -> None:
        """Choose every matrix's plan again, under what the budget (or a new one) now leaves for state, and convert their states. A step
        does so by itself when the ledger has seen activations grow, and for parameters that it steps for the first time.

        Raises: ConfigError without a budget, or for one that cannot be met; nothing is changed then.
        """
        if self._controller is not None:
            raise ConfigError.of("policy", type(self._controller.policy).__name__, "None: plans under a policy are the policy's to choose")
        budget = self._budget
        if memory_budget is not None:
            budget = StateBudget(memory_budget, None if budget is None else budget.ledger)
        if budget is None:
            raise ConfigError.of("memory_budget", None, "a number of bytes, here or when the optimizer is made")
        chosen = budget.choose(self)
        self._budget = budget
        for options in (self.defaults, *self.param_groups):
            options["memory_budget"] = budget.value
        growth = {p: layer_nbytes(p.shape, plan) - layer_nbytes(p.shape, self._places[p].plan) for p, plan in chosen.items()}
        for param in sorted(growth, key=lambda param: growth[param]):  # what shrinks makes room for what grows
            self._set_plan(param, chosen[param])

    def _set_plan(self, param: Tensor, new: LayerPlan | None) -> None:
        place = self._places[param]
        if new == place.plan:
            return
        if self.state.get(param):
            self.state[param] = self._converted(param, self.state[param], place.plan, new)
        self._stacks.of.pop(param, None)
        number = next(number for number, other in enumerate(place.group["params"]) if other is param)
        plans = {key: value for key, value in place.group.get("plans", {}).items() if key != number}
        as_asked = new == asked(place.group, place.name, param.shape)
        place.group["plans"] = plans if as_asked else plans | {number: None if new is None else new.plain()}
        self._places[param] = place._replace(plan=new)

    def _converted(self, param: Tensor, state: dict[str, Any], old: LayerPlan | None, new: LayerPlan | None) -> dict[str, Any]:
        place = self._places[param]
        seed = (place.group["seed"], state["step"], place.number, matrix_count(param.shape))  # a step's last counter is below that
        return convert(state, param.shape, old, new, param.device, seed, place.name)

    def _register(self, group: dict[str, Any]) -> None:
        number = next(number for number, other in enumerate(self.param_groups) if other is group)
        names = group.get("param_names") or [f"param_groups[{number}]['params'][{place}]" for place in range(len(group["params"]))]
        for place, (param, name) in enumerate(zip(group["params"], names, strict=True)):
            self._places[param] = Place(group, name, len(self._places), in_force(group, place, name, param.shape))

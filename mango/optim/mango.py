"""Mango: Adam in a tracked subspace, with error feedback and a residual direction, for matrices of any size and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes
from mango.optim.adamw import adamw
from mango.optim.budgeted import StateBudget
from mango.optim.convert import convert, moved
from mango.optim.fused import FusedBackward
from mango.optim.guard import Guard
from mango.optim.layers import Hyper, LayerStack, Workspace
from mango.optim.options import plan_of, validate
from mango.optim.plan import LayerPlan, is_adapter, is_matrix, matrix_count, matrix_shape

if TYPE_CHECKING:
    from mango.policy.base import Policy
    from mango.policy.controller import Controller
    from mango.telemetry import MemoryLedger

ASKED = ("plan", "plans", "memory_budget")  # options of a group that loading a state leaves as they are, unless none of them was changed
STACK_VALUES = 1 << 22  # values of one batched product: 16 MiB of float32 workspace, however many layers share a shape


class Mango(torch.optim.Optimizer):
    r"""Adam on rank-r factors of each gradient matrix, with everything that the factors miss remembered.

    Each matrix G (m, n), m <= n after folding (out, rest) and transposing where needed, is stepped as

    .. math::
        H &= G + E                                  && \text{gradient and kept error} \\
        P &= \mathrm{orth}(H H^\top [P', S])         && \text{one warm power step, } S \text{ fresh Gaussian scouts} \\
        U &= P^\top H, \quad R = P^\top P'          && (r, n), (r, r) \\
        M &= \beta_1 R M + (1-\beta_1) U, \quad
        V = \beta_2 (R \circ R) V + (1-\beta_2) U \circ U && \text{rows new to the basis start from U} \\
        A &= \hat M / (\sqrt{\hat V} + \epsilon) \\
        F &= H - P U, \quad a = \mathrm{mean}_j F_{ij}^2, \quad b = \mathrm{mean}_i F_{ij}^2 && \text{running means too, (m), (n)} \\
        D &= P A + s F / \sqrt{a b^\top / \sqrt{\bar a \bar b}} && \text{residual direction, s at most 1, bounded by A} \\
        E &= F                                      && \text{kept as the plan says} \\
        W &\leftarrow (1 - \eta\lambda) W - \eta D

    or, with ``power="half"``, P = orth(H [M', S]ᵀ) from the momentum. The map H -> PU contracts with T3's certificate in expectation over
    the scouts. Between steps only P, M, sqrt(V) and E are kept, each through the codec that the plan names. Tensors with fewer than two
    dimensions or 4096 values, LoRA's factors (known by peft's names) and groups with ``plan=None`` are stepped by plain AdamW with
    float32 moments.

    Sources: GaLore (arXiv:2403.03507) for Adam on a projected gradient, Fira (arXiv:2410.01623) for stepping along the residual,
    Adafactor (arXiv:1804.04235) for its scales, LDAdam (arXiv:2410.16103) for moments that follow the basis and for the kept error.
    Departures: the basis moves every step by products alone, never by an SVD; scouts; the residual is both stepped along and kept as
    error; the state is stored by codecs.

    Args:
        params: parameters, (name, parameter) pairs as from ``model.named_parameters()``, or groups of either. A group may set any
            option below.
        lr: learning rate, > 0 or 0.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: decoupled, >= 0.
        plan: a LayerPlan, a mapping of its fields, or None for plain AdamW.
        maximize: ascend instead.
        seed: with the step it determines the scouts.
        matmul: "float32", "bfloat16", or "auto": bfloat16 for matrices of at least 2^18 values where the processor has units for it
            (AVX512-BF16, AMX, CUDA from compute capability 8.0 on). Sums are in float32 and so is what is kept; a step differs by rounding.
        memory_budget: of ``nbytes()``, in bytes or as "24GiB", "0.5 bytes/param": the best plan for each matrix under it is chosen (see
            mango.policy.Budget) and takes the place of ``plan``, except in groups whose plan is None. Never exceeded: parameters that are
            unfrozen or added later make the others smaller.
        ledger: with ``memory_budget``: the budget is of everything that this ledger counts (weights, gradients, saved activations) and the
            state together. Where it has seen more activations than before, the next step starts by choosing plans anew.
        policy: a name of mango.policy.REGISTRY or a Policy: it chooses every matrix's rank and bits anew, before the first step and after
            each ``policy_every``-th, starting from ``plan``, and within ``memory_budget``. States are converted (see ``set_plan``).
        policy_every: steps between two choices, at least 1.
        fuse_backward: step each parameter as soon as its gradient is complete, during ``backward``, and free the gradient: at its peak one
            layer's gradient is held. ``step()`` then ends the round (see mango.optim.fused for accumulation and clipping).
        max_norm: with ``fuse_backward``, clip gradients to this norm, as estimated from the rounds before.

    Raises:
        ConfigError: for an option that is not legal, a sparse, complex or integer parameter or gradient, or a state that does not
            fit the plan.
        NonFinite: when a gradient holds NaN or infinity: before anything was changed, or, on CUDA, at the next call (the gradient
            was taken as zero, so that no step waits for the host).

    >>> weight = torch.nn.Parameter(torch.eye(64))
    >>> optimizer = Mango([("weight", weight)], lr=0.01, plan=LayerPlan(rank=8))
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     _ = optimizer.step()
    >>> bool(weight.square().sum() < 1.0)
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        plan: LayerPlan | Mapping[str, Any] | None = LayerPlan(),  # noqa: B008  (frozen)
        *,
        maximize: bool = False,
        seed: int = 0,
        matmul: str = "auto",
        memory_budget: int | float | str | None = None,
        ledger: MemoryLedger | None = None,
        policy: Policy | str | None = None,
        policy_every: int = 50,
        fuse_backward: bool = False,
        max_norm: float | None = None,
    ) -> None:
        if max_norm is not None and not (fuse_backward and 0.0 < max_norm < float("inf")):
            raise ConfigError.of("max_norm", max_norm, "a number > 0 with fuse_backward=True; without it, torch.nn.utils.clip_grad_norm_")
        if ledger is not None and (memory_budget is None or policy is not None):
            legal = "given together with memory_budget, which it is counted against, and without a policy"
            raise ConfigError.of("ledger", type(ledger).__name__, legal)
        self._fused: FusedBackward | None = None
        self._budget: StateBudget | None = None
        self._controller: Controller | None = None
        self._prepare()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "plan": plan}
        defaults |= {"maximize": maximize, "seed": seed, "matmul": matmul, "memory_budget": memory_budget}
        super().__init__(params, defaults)
        if fuse_backward:
            self._fused = FusedBackward(self, max_norm)
        if policy is not None:
            from mango.policy import controller_for

            self._controller = controller_for(policy, policy_every, memory_budget, self.shapes())
            self._controller.adopt(self)
        elif memory_budget is not None:
            self._budget = StateBudget(memory_budget, ledger)
            self.replan()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validate(group)
            if group["plan"] is not None:
                plan = LayerPlan.of(group["plan"])
                group["plan"] = plan.plain()  # plain values, so that state_dict loads with weights_only=True
            self._register(group)
            for param in group["params"]:
                name = self._places[param].name
                if not param.is_floating_point():
                    raise ConfigError.of(f"{name}.dtype", param.dtype, "a real floating point type")
                if self._places[param].plan is not None:
                    plan.columns(*matrix_shape(param.shape), name)
            if group["memory_budget"] != self.defaults["memory_budget"]:
                raise ConfigError.of("memory_budget of a group", group["memory_budget"], "left out: it is one for the whole optimizer")
            if self._budget is not None:
                self.replan()
        except ConfigError:
            self.param_groups.pop()
            for param in group["params"]:
                self._places.pop(param, None)
            raise
        if self._controller is not None:
            self._controller.adopt(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_fused", None)  # a copy has parameters of its own, without hooks
        self.__dict__.setdefault("_controller", None)  # and nobody who changes its plans
        self.__dict__.setdefault("_budget", None)
        self._prepare()
        for group in self.param_groups:
            self._register(group)

    def _register(self, group: dict[str, Any]) -> None:
        number = next(number for number, other in enumerate(self.param_groups) if other is group)
        names = group.get("param_names") or [f"param_groups[{number}]['params'][{place}]" for place in range(len(group["params"]))]
        for place, (param, name) in enumerate(zip(group["params"], names, strict=True)):
            plan = plan_of(group, place) if is_matrix(param.shape) and not is_adapter(name) else None
            self._places[param] = _Place(group, name, len(self._places), plan)

    def _prepare(self) -> None:
        self._guard = Guard()
        self._places: dict[Tensor, _Place] = {}
        # parameter -> the stack that its state is a view of; built anew from the state when absent
        self._stacks: dict[Tensor, LayerStack] = {}
        self._workspaces: dict[torch.device, Workspace] = {}
        self._observing = False
        self._diagnostics: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._fused is not None:
            self._fused.finish()
        self._advance([param for group in self.param_groups for param in group["params"] if param.grad is not None])
        if self._controller is not None:
            self._controller.stepped(self, self._steps())
        return loss

    def _steps(self) -> int:
        """Of the parameter that has been stepped most often."""
        return max((state["step"] for state in self.state.values() if state), default=0)

    def signal(self, **values: float) -> None:
        """Tell the policy, if there is one, how the run goes: ``loss``, ``progress`` (0 to 1), ``seconds`` of a step, ``watts``.

        What is never told, the policy knows as unknown. Times and power differ from run to run: tell them only where a run need not
        repeat bit for bit.

        Raises: ConfigError for another signal.
        """
        from mango.policy.controller import SIGNALS

        for name in values:
            if name not in SIGNALS:
                raise ConfigError.of("signal", name, "one of " + ", ".join(SIGNALS))
        if self._controller is not None:
            self._controller.signals |= values

    @property
    def policy(self) -> Policy | None:
        """The policy in charge."""
        return None if self._controller is None else self._controller.policy

    def _advance(self, params: list[Tensor]) -> None:
        """Step these parameters, which have gradients."""
        for param in params:
            grad, name = param.grad, self._places[param].name
            assert grad is not None
            if grad.is_sparse or grad.is_complex():
                raise ConfigError.of(f"{name}.grad", "sparse" if grad.is_sparse else "complex", "a dense real gradient")
        gradients = [param.grad.detach() for param in params if param.grad is not None]  # one made with create_graph has a graph of its own
        grads = self._guard.admit(gradients, [self._places[param].name for param in params])
        if self._budget is not None and self._budget.stale(params):
            self.replan()
        if self._fused is None:
            self._diagnostics = {}
        small: dict[tuple[Any, ...], list[_Item]] = {}
        large: dict[tuple[Any, ...], list[_Item]] = {}
        for param, grad in zip(params, grads, strict=True):
            place = self._places[param]
            item = _Item(param, grad, place)
            if place.plan is None:
                small.setdefault((id(place.group), param.device), []).append(item)
            else:
                step = self.state[param].get("step", 0)
                large.setdefault((id(place.group), place.plan, param.shape, param.dtype, param.device, step), []).append(item)
        for items in small.values():
            self._step_small(items)
        for items in large.values():
            layers = max(1, STACK_VALUES // items[0].param.numel())
            for first in range(0, len(items), layers):
                self._step_stack(items[first : first + layers])

    def _step_small(self, items: list[_Item]) -> None:
        group, params = items[0].place.group, [item.param for item in items]
        for param in params:
            state = self.state[param]
            if not state:
                zeros = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
                state.update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
            state["step"] += 1
        states = [self.state[param] for param in params]
        adamw(
            params,
            [item.grad for item in items],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )

    def _step_stack(self, items: list[_Item]) -> None:
        group, params = items[0].place.group, [item.param for item in items]
        stack = self._stack(items)
        for param in params:
            self.state[param]["step"] += 1
        step = self.state[params[0]]["step"]
        hyper = Hyper(
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            step=step,
            seeds=[(group["seed"], step, item.place.number, part) for item in items for part in range(matrix_count(item.param.shape))],
            matmul=group["matmul"],
        )
        device = params[0].device
        workspace = self._workspaces.setdefault(device, Workspace(device))
        matrices = [part for item in items for part in as_matrices(item.param)]
        gradients = [part for item in items for part in as_matrices(item.grad)]
        watching = self._observing or (self._controller is not None and self._controller.watching)
        names = [name for item in items for name in item.names()] if watching else None
        self._diagnostics.update(stack.step(matrices, gradients, hyper, workspace, names))

    def _stack(self, items: list[_Item]) -> LayerStack:
        """The stack whose members are exactly these parameters; formed anew, from their states, when the members changed."""
        first = items[0].param
        each = matrix_count(first.shape)
        stack = self._stacks.get(first)
        if stack is not None and stack.layers == each * len(items) and all(self._stacks.get(item.param) is stack for item in items):
            return stack
        shape = matrix_shape(first.shape)
        plan = items[0].place.plan
        assert plan is not None
        stack = LayerStack(plan, shape, each * len(items), first.device, items[0].place.name)
        for number, item in enumerate(items):
            state = self.state[item.param]
            if state:
                stack.load(number * each, each, state, item.place.name)
            self.state[item.param] = {"step": state.get("step", 0), **stack.views(number * each, each)}
            self._stacks[item.param] = stack
        return stack

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state: bit for bit, plans that ``set_plan`` had changed included, where the groups ask for the plans that they
        asked for when it was saved. Where a group's ``plan`` (or the budget) is another one now, its parameters' states are converted to
        it (see ``mango.optim.convert`` for what that drops). Every other option is the saved one, as with any torch optimizer.

        Raises: ConfigError when it does not fit the parameters or the plans that it was saved with, or holds no data (the meta device).
        """
        # torch's own method would cast codes to the parameters' dtype
        saved = state_dict["state"]
        if any("plan" not in group for group in state_dict["param_groups"]):
            raise ConfigError.of("state_dict", "parameter groups without a plan", "a state that Mango saved")
        asked: list[dict[str, Any]] = [{key: group[key] for key in ASKED if key in group} for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        before = [place.plan for place in self._places.values()]
        for group, own in zip(self.param_groups, asked, strict=True):
            if (plan_of(group), group.get("memory_budget")) != (plan_of(own), own["memory_budget"]):
                group.pop("plans", None)
                group.update(own)
        self._prepare()
        for group in self.param_groups:
            self._register(group)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, plan, (param, place) in zip(numbers, before, self._places.items(), strict=True):
            if saved.get(number):
                state = {key: moved(value, param.device, f"state of {place.name}, {key}") for key, value in saved[number].items()}
                self.state[param] = self._converted(param, state, plan, place.plan)
        if self._controller is not None:
            self._controller.watching = (self._steps() + 1) % self._controller.every == 0

    def _converted(self, param: Tensor, state: dict[str, Any], old: LayerPlan | None, new: LayerPlan | None) -> dict[str, Any]:
        place = self._places[param]
        seed = (place.group["seed"], state["step"], place.number, matrix_count(param.shape))  # a step's last counter is below that
        return convert(state, param.shape, old, new, param.device, seed, place.name)

    def plans(self) -> dict[str, LayerPlan | None]:
        """The plan in force of every parameter that is large enough for one, by name; None = plain AdamW."""
        return {place.name: place.plan for param, place in self._places.items() if is_matrix(param.shape)}

    def own_plans(self) -> dict[str, LayerPlan | None]:
        """The plans that the groups ask for, whatever ``set_plan`` or a policy made of them."""
        asked = {place.name: plan_of(place.group) for param, place in self._places.items() if is_matrix(param.shape)}
        return {name: None if is_adapter(name) else plan for name, plan in asked.items()}

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
        self._stacks.pop(param, None)
        number = next(number for number, other in enumerate(place.group["params"]) if other is param)
        plans = {key: value for key, value in place.group.get("plans", {}).items() if key != number}
        place.group["plans"] = plans if new == plan_of(place.group) else plans | {number: None if new is None else new.plain()}
        self._places[param] = place._replace(plan=new)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only: it loads with ``torch.load(weights_only=True)``."""
        self._guard.settle()
        return super().state_dict()

    def accumulate(self) -> AbstractContextManager[None]:
        """``with optimizer.accumulate():`` gradients of the backward passes inside add up; nothing is stepped by ``fuse_backward``."""
        return nullcontext() if self._fused is None else self._fused.hold()

    def nbytes(self) -> int:
        """Bytes of every tensor kept between steps: bases, moments, errors and their scales."""
        return sum(value.nbytes for state in self.state.values() for value in state.values() if isinstance(value, Tensor))

    def observe(self, on: bool = True) -> None:
        """Whether steps record ``diagnostics``; that costs another pass and, on an accelerator, a synchronisation."""
        self._observing = on

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Of the last observed step, for each compressed layer by name.

        ``certified``: T3's contraction of the basis (times T4's of the factor codec) in expectation over the scouts;
        ``measured``: 1 - ‖H - C(H)‖²/‖H‖²; ``energy``: ‖PᵀH‖²/‖H‖²; ``drift``: mean cosine of the principal angles with the basis
        before; ``error_ratio``: ‖E‖/‖G‖; ``norm``: ‖G‖; ``cosine``: between momentum and gradient in the basis; ``variance``: 1 -
        ‖M̂‖²/‖√V̂‖², near 1 where gradients disagree from step to step.
        """
        return dict(self._diagnostics)


class _Place(NamedTuple):
    """Where a parameter stands: its group, its name for messages, and its number, which never changes."""

    group: dict[str, Any]
    name: str
    number: int
    plan: LayerPlan | None  # in force; None = plain AdamW


@dataclass(slots=True)
class _Item:
    """One parameter in a step."""

    param: Tensor
    grad: Tensor
    place: _Place

    def names(self) -> list[str]:
        """Of its matrices."""
        each = matrix_count(self.param.shape)
        return [self.place.name] if each == 1 else [f"{self.place.name}[{part}]" for part in range(each)]


def as_matrices(tensor: Tensor) -> list[Tensor]:
    """Views of the matrices."""
    return list(tensor.detach().unbind(0)) if matrix_count(tensor.shape) > 1 else [tensor]

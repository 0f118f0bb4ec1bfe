"""Mango: Adam in a tracked subspace, with error feedback and a residual direction, for matrices of any size and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mango.errors import ConfigError
from mango.optim.base import loss_of
from mango.optim.budgeted import StateBudget
from mango.optim.convert import moved
from mango.optim.fused import FusedBackward
from mango.optim.guard import Guard
from mango.optim.options import plan_of, validate
from mango.optim.plan import LayerPlan, matrix_shape
from mango.optim.planned import Planned
from mango.optim.rehearsal import rehearse
from mango.optim.stacks import Item, Place, Stacks

if TYPE_CHECKING:
    from mango.policy.base import Policy
    from mango.policy.controller import Controller
    from mango.telemetry import MemoryLedger

ASKED = ("plan", "plans", "memory_budget")  # options of a group that loading a state leaves as they are, unless none of them was changed


class Mango(Planned):
    r"""Adam on rank-r factors of each gradient matrix, with everything that the factors miss remembered.

    Each matrix G (m, n), m <= n after folding (out, rest) and transposing where needed, is stepped as

    .. math::
        H &= G + b E                                && \text{gradient and kept error, fading by } b \\
        P &= \mathrm{orth}(H H^\top [P', S])         && \text{one warm power step, } S \text{ fresh Gaussian scouts} \\
        U &= P^\top H, \quad R = P^\top P'          && (r, n), (r, r) \\
        M &= \beta_1 R M + (1-\beta_1) U, \quad
        V = \beta_2 (R \circ R) V + (1-\beta_2) U \circ U && \text{rows new to the basis start from U} \\
        A &= \hat M / (\sqrt{\hat V} + \epsilon) \\
        F &= H - P U, \quad a = \mathrm{mean}_j F_{ij}^2, \quad b = \mathrm{mean}_i F_{ij}^2 && \text{running means too, (m), (n)} \\
        D &= P A + s F / \sqrt{a b^\top / \sqrt{\bar a \bar b}} && \text{residual direction, s at most 1, bounded by A} \\
        E &= F                                      && \text{kept as the plan says} \\
        W &\leftarrow (1 - \eta\lambda) W - \eta D \circ (1 + c \text{ where } D_{ij} G_{ij} > 0, \text{ else } 1 - c)

    or, for large matrices and with ``power="sampled"``, with a quarter of the columns of H in the second line and the rest taken to leave
    P' as it is (damping, see mango.subspace.power_step), and with "half" P = orth(H [M', S]ᵀ) from the momentum.
    Without stored error F is not formed: D = diag(a) (P A + F diag(s)), where a, of mean square 1, is made of the rows of H in the place of
    those of F, and scales P A too. The map H -> PU contracts with T3's certificate in expectation over the scouts. Between steps only P, M,
    sqrt(V), E and the running means are kept, each through the codec that the plan names. Tensors with fewer than two dimensions or 4096
    values, LoRA's factors (known by peft's names) and groups with ``plan=None`` are stepped by plain AdamW with float32 moments; unless a
    plan is given, so are linear maps with sixteen inputs or more for each output, such as heads of classifiers. Heads with more classes
    than that do better in a group with ``plan=None``, too.

    On a CPU an optimizer rehearses when it is made: a stand-in for a part of the matrices is stepped, in about the time of a few steps, so
    that compiled loops are loaded and scratch memory is there before the first step. Once for an installation the loops are compiled then,
    which takes some seconds.

    Sources: GaLore (arXiv:2403.03507) for Adam on a projected gradient, Fira (arXiv:2410.01623) for stepping along the residual,
    Adafactor (arXiv:1804.04235) for its scales, LDAdam (arXiv:2410.16103) for moments that follow the basis and for the kept error,
    Cautious Optimizers (arXiv:2411.16085) for the last line.
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
        matmul: of products: "float32", "bfloat16", "int8" (on a CPU; see mango.products), or "auto": for matrices of at least 2^18 values
            bfloat16 where the processor has units for it (AVX512-BF16, AMX, CUDA from compute capability 8.0 on), and int8 for what is
            lifted from a basis of more than ``mango.products.FEW`` directions where a CPU has units for that (VNNI) and numba is installed.
            With "int8" products with the gradient are too: faster, but its weak directions drown in the rounding where strong ones hold
            nearly everything. Sums are in float32 or int32, what is kept is as the plan says; a step differs by rounding. With numba, H is
            formed in bfloat16 where it is multiplied so and its error is kept in four bits.
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
        self._rehearse()

    def _rehearse(self) -> None:
        """Let the first step on a CPU find what it needs."""
        ours = [
            Item(param, param, place)
            for param, place in self._places.items()
            if place.plan is not None and param.requires_grad and param.device.type == "cpu" and type(param) in (Tensor, torch.nn.Parameter)
        ]
        rehearse(self._stacks, ours, singly=self._fused is not None)

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

    def _prepare(self) -> None:
        self._guard = Guard()
        self._places: dict[Tensor, Place] = {}
        self._stacks = Stacks()
        self._observing = False
        self._diagnostics: dict[str, dict[str, float]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss, if there is a closure."""
        loss = loss_of(closure)
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
        watching = self._observing or (self._controller is not None and self._controller.watching)
        items = [Item(param, grad, self._places[param]) for param, grad in zip(params, grads, strict=True)]
        self._diagnostics.update(self._stacks.step(items, self.state, watching))

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
        scratch = self._stacks.scratch
        super().load_state_dict({**state_dict, "state": {}})
        before = [place.plan for place in self._places.values()]
        for group, own in zip(self.param_groups, asked, strict=True):
            if (plan_of(group), group.get("memory_budget")) != (plan_of(own), own["memory_budget"]):
                group.pop("plans", None)
                group.update(own)
        self._prepare()
        self._stacks.scratch = scratch
        for group in self.param_groups:
            self._register(group)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, plan, (param, place) in zip(numbers, before, self._places.items(), strict=True):
            if saved.get(number):
                state = {key: moved(value, param.device, f"state of {place.name}, {key}") for key, value in saved[number].items()}
                self.state[param] = self._converted(param, state, plan, place.plan)
        if self._controller is not None:
            self._controller.watching = (self._steps() + 1) % self._controller.every == 0

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

"""Mango: Adam in a tracked subspace, with error feedback and a residual direction, for matrices of any size and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from mango.errors import ConfigError
from mango.optim.adamw import adamw
from mango.optim.guard import Guard
from mango.optim.layers import Hyper, LayerStack, Workspace
from mango.optim.plan import LayerPlan

SMALLEST = 4096  # values; smaller tensors keep plain AdamW, as in torchao's low-bit optimizers and bitsandbytes
MATMUL = ("auto", "float32", "bfloat16")
STACK_VALUES = 1 << 22  # values of one batched product: 16 MiB of float32 workspace, however many layers share a shape


class Mango(torch.optim.Optimizer):
    r"""Adam on rank-r factors of each gradient matrix, with everything that the factors miss remembered.

    Each matrix G (m, n), m <= n after folding (out, rest) and transposing where needed, is stepped as

    .. math::
        H &= G + E                                  && \text{gradient and kept error} \\
        P &= \mathrm{orth}(H [M', S]^\top)           && \text{warm start from the momentum, } S \text{ fresh Gaussian scouts} \\
        U &= P^\top H, \quad R = P^\top P'          && (r, n), (r, r) \\
        M &= \beta_1 R M + (1-\beta_1) U, \quad
        V = \beta_2 (R \circ R) V + (1-\beta_2) U \circ U && \text{rows new to the basis start from U} \\
        A &= \hat M / (\sqrt{\hat V} + \epsilon) \\
        D &= P A + (H - P U)\,\mathrm{diag}(\|A_{:j}\| / \|U_{:j}\|) && \text{residual direction, its scales bounded} \\
        E &= H - P U                                && \text{kept as the plan says} \\
        W &\leftarrow (1 - \eta\lambda) W - \eta D

    The map H -> PU contracts with T3's certificate in expectation over the scouts. Between steps only P, M, sqrt(V) and E are kept,
    each through the codec that the plan names. Tensors with fewer than two dimensions or 4096 values, and groups with ``plan=None``,
    are stepped by plain AdamW with float32 moments.

    Sources: GaLore (arXiv:2403.03507) for Adam on a projected gradient, Fira (arXiv:2410.01623) for the residual's column scales, LDAdam
    (arXiv:2410.16103) for moments that follow the basis and for the kept error. Departures: the basis moves every step by products alone,
    never by an SVD; scouts; the residual is both stepped along and kept as error; the state is stored by codecs.

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
    ) -> None:
        self._prepare()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "plan": plan}
        defaults |= {"maximize": maximize, "seed": seed, "matmul": matmul}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _validate(group)
            if group["plan"] is not None:
                plan = LayerPlan.of(group["plan"])
                group["plan"] = plan.plain()  # plain values, so that state_dict loads with weights_only=True
            for position, param in enumerate(group["params"]):
                name = self._name(group, position)
                if not param.is_floating_point():
                    raise ConfigError.of(f"{name}.dtype", param.dtype, "a real floating point type")
                if group["plan"] is not None and _is_matrix(param):
                    plan.columns(param.shape[0], prod(param.shape[1:]), name)
        except ConfigError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def _prepare(self) -> None:
        self._guard = Guard()
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
        active = [
            (group, param, self._name(group, position))
            for group in self.param_groups
            for position, param in enumerate(group["params"])
            if param.grad is not None
        ]
        for _, param, name in active:
            if param.grad.is_sparse or param.grad.is_complex():
                raise ConfigError.of(f"{name}.grad", "sparse" if param.grad.is_sparse else "complex", "a dense real gradient")
        grads = self._guard.admit([param.grad for _, param, _ in active], [name for _, _, name in active])
        self._diagnostics = {}
        small: dict[tuple[Any, ...], list[_Item]] = {}
        large: dict[tuple[Any, ...], list[_Item]] = {}
        for (group, param, name), grad in zip(active, grads, strict=True):
            item = _Item(param, grad, name, group)
            if group["plan"] is None or not _is_matrix(param):
                small.setdefault((id(group), param.device), []).append(item)
            else:
                step = self.state[param].get("step", 0)
                large.setdefault((id(group), param.shape, param.dtype, param.device, step), []).append(item)
        for items in small.values():
            self._step_small(items)
        index = 0
        for items in large.values():
            layers = max(1, STACK_VALUES // items[0].param.numel())
            for first in range(0, len(items), layers):
                self._step_stack(items[first : first + layers], index)
                index += 1
        return loss

    def _step_small(self, items: list[_Item]) -> None:
        group, params = items[0].group, [item.param for item in items]
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

    def _step_stack(self, items: list[_Item], index: int) -> None:
        group, params = items[0].group, [item.param for item in items]
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
            seed=(group["seed"], step, index),
            matmul=group["matmul"],
        )
        device = params[0].device
        workspace = self._workspaces.setdefault(device, Workspace(device))
        names = [item.name for item in items] if self._observing else None
        self._diagnostics.update(stack.step(params, [item.grad for item in items], hyper, workspace, names))

    def _stack(self, items: list[_Item]) -> LayerStack:
        """The stack whose members are exactly these parameters; formed anew, from their states, when the members changed."""
        params = [item.param for item in items]
        stack = self._stacks.get(params[0])
        if stack is not None and stack.layers == len(params) and all(self._stacks.get(param) is stack for param in params):
            return stack
        stack = LayerStack(LayerPlan.of(items[0].group["plan"]), params[0].shape, len(params), params[0].device, items[0].name)
        for layer, item in enumerate(items):
            state = self.state[item.param]
            if state:
                stack.load(layer, state, item.name)
            self.state[item.param] = {"step": state.get("step", 0), **stack.views(layer)}
            self._stacks[item.param] = stack
        return stack

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state, bit for bit. Raises: ConfigError when it does not fit the parameters or their plans."""
        # torch's own method would cast codes to the parameters' dtype
        saved = state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        places = [(group, position) for group in self.param_groups for position in range(len(group["params"]))]
        for number, (group, position) in zip(numbers, places, strict=True):
            if number not in saved:
                continue
            param, name = group["params"][position], self._name(group, position)
            state = {key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value for key, value in saved[number].items()}
            if group["plan"] is not None and _is_matrix(param):
                LayerStack(LayerPlan.of(group["plan"]), param.shape, 1, param.device, name).load(0, state, name)
            else:
                for key in ("exp_avg", "exp_avg_sq"):
                    if key not in state or state[key].shape != param.shape:
                        raise ConfigError.of(f"state of {name}, {key}", state.keys(), f"a tensor of shape {tuple(param.shape)}")
            self.state[param] = state

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only: it loads with ``torch.load(weights_only=True)``."""
        self._guard.settle()
        return super().state_dict()

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
        before; ``error_ratio``: ‖E‖/‖G‖.
        """
        return dict(self._diagnostics)

    def _name(self, group: dict[str, Any], position: int) -> str:
        if "param_names" in group:
            return group["param_names"][position]
        number = next(index for index, other in enumerate(self.param_groups) if other is group)
        return f"param_groups[{number}]['params'][{position}]"


@dataclass(slots=True)
class _Item:
    """One parameter in a step."""

    param: Tensor
    grad: Tensor
    name: str
    group: dict[str, Any]


def _is_matrix(param: Tensor) -> bool:
    return param.ndim >= 2 and param.numel() >= SMALLEST


def _validate(group: dict[str, Any]) -> None:
    lr, betas, eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if not 0.0 <= float(lr) < float("inf"):
        raise ConfigError.of("lr", lr, "a finite number >= 0")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError.of("betas", betas, "two numbers in [0, 1)")
    if not 0.0 <= eps < float("inf"):
        raise ConfigError.of("eps", eps, "a finite number >= 0")
    if not 0.0 <= decay < float("inf"):
        raise ConfigError.of("weight_decay", decay, "a finite number >= 0")
    if group["matmul"] not in MATMUL:
        raise ConfigError.of("matmul", group["matmul"], "one of " + ", ".join(MATMUL))
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], int) or group["seed"] < 0:
        raise ConfigError.of("seed", group["seed"], "an integer >= 0")

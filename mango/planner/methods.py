"""Optimizers as the planner sees them: bytes kept between steps, exactly, and the most that a step needs besides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from mango import optim
from mango.errors import ConfigError
from mango.optim.accounting import layer_nbytes, state_tensors
from mango.optim.adamw import adamw
from mango.optim.layers import Hyper, LayerStack
from mango.optim.plan import LayerPlan, applied, matrix_count, matrix_shape
from mango.optim.split import split
from mango.optim.stacks import STACK_VALUES
from mango.planner.trace import Watch
from mango.products import HALVES_PAY
from mango.workspace import Workspace

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # of trainable parameters, by name

STEP = 4  # bytes of torch's step counter, a float32 scalar for each parameter
MAPS = 2 * 256 * 4  # bytes of bitsandbytes' two code maps, float32, shared by all parameters
BLOCK = 256  # values that share a scale in bitsandbytes' state
SMALLEST = 4096  # values below which bitsandbytes keeps float32 moments


@dataclass(frozen=True)
class Method:
    """One row of the planner's table.

    Attributes:
        optimizer: a name of mango.optim's registry.
        fused: the optimizer steps each parameter in the backward pass and frees its gradient.
        dtype: of weights and gradients; None takes the plan's.
        budget: Mango's plans are chosen to fill the card (``mango.policy.Budget``).
        mole: fields of the MoleConfig by which the linear layers inside the model are converted; None = they stay as they are.
    """

    optimizer: str
    fused: bool = False
    dtype: torch.dtype | None = None
    budget: bool = False
    mole: Mapping[str, str | int] | None = None


CHUNK = {"chunk": 16384}  # tokens that a converted layer works on at a time: what it needs meanwhile stops growing there
METHODS = {
    "adamw-fp32": Method("adamw", dtype=torch.float32),
    "adamw": Method("adamw"),
    "adamw8bit": Method("adamw8bit"),
    "adafactor": Method("adafactor"),
    "muon": Method("muon"),
    "galore": Method("galore"),
    "galore8bit": Method("galore8bit"),
    "mango": Method("mango"),
    "adamw8bit+fused": Method("adamw8bit", fused=True),
    "galore+fused": Method("galore", fused=True),
    "galore8bit+fused": Method("galore8bit", fused=True),
    "mango+fused": Method("mango", fused=True),
    "mango+fused+int4": Method("mango", fused=True, mole={"store": "int4", **CHUNK}),
    "mango+fused+int2": Method("mango", fused=True, mole={"store": "int2", **CHUNK}),
    "mango+fused+int2-hidden": Method("mango", fused=True, mole={"store": "int2", "hidden": "recompute", **CHUNK}),
    "mango-budget": Method("mango", fused=True, budget=True),
}


def method(name: str) -> Method:
    """Raises: ConfigError for a name that is not known."""
    if name not in METHODS:
        raise ConfigError.of("method", name, "one of " + ", ".join(METHODS))
    return METHODS[name]


def divide(shapes: Shapes, exclude: Sequence[str]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """The parameters that a method for matrices takes, and the rest (see ``mango.optim.split``)."""
    named = [(name, torch.empty(shape, device="meta", requires_grad=True)) for name, shape in shapes.items()]
    matrices, rest = split(named, exclude)
    return {name: tuple(param.shape) for name, param in matrices}, {name: tuple(param.shape) for name, param in rest}


def state_nbytes(
    optimizer: str,
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    exclude: Sequence[str] = (),
    rank: int | float = 1 / 8,
    plans: Mapping[str, LayerPlan] | LayerPlan = LayerPlan(),  # noqa: B008  (frozen)
) -> int:
    """What ``mango.optim.state_nbytes`` counts after a step of the registry's optimizer over these parameters.

    Args:
        optimizer: name of the registry.
        shapes: of the trainable parameters.
        dtype: of the parameters, and of the moments of the methods that follow it.
        exclude: parameters that Muon, GaLore and Mango leave to AdamW.
        rank: GaLore's.
        plans: Mango's, for all matrices or by name.

    Raises: ConfigError for an optimizer whose state the planner does not know.
    """
    size = dtype.itemsize
    matrices, rest = divide(shapes, exclude)
    if optimizer == "adamw":
        return sum(2 * prod(shape) * size + STEP for shape in shapes.values())
    if optimizer == "adafactor":
        return sum(_adafactor(shape) * size + STEP for shape in shapes.values())
    if optimizer == "muon":
        return sum(prod(shape) * size for shape in matrices.values()) + state_nbytes("adamw", rest, dtype)
    if optimizer == "adamw8bit":
        return _eight_bits(map(prod, shapes.values()))
    if optimizer in ("galore", "galore8bit"):
        sizes = [_galore(name, shape, rank) for name, shape in matrices.items()]
        moments = [moment for _, moment in sizes] + [prod(shape) for shape in rest.values()]
        return sum(basis for basis, _ in sizes) * size + (2 * sum(moments) * size if optimizer == "galore" else _eight_bits(moments))
    if optimizer == "mango":
        chosen = {name: _plan(plans, name, shape) for name, shape in matrices.items()}
        return sum(layer_nbytes(shape, chosen.get(name)) for name, shape in shapes.items())
    raise ConfigError.of("optimizer", optimizer, "adamw, adafactor, muon, adamw8bit, galore, galore8bit or mango")


def _plan(plans: Mapping[str, LayerPlan] | LayerPlan, name: str, shape: Shape) -> LayerPlan | None:
    """A matrix's own; or what Mango makes of one plan for all."""
    return applied(plans, name, shape) if isinstance(plans, LayerPlan) else plans.get(name)


def _adafactor(shape: Shape) -> int:
    """Row and column means of the folded matrix, or the whole second moment of a vector."""
    return shape[0] + prod(shape[1:]) if len(shape) > 1 else prod(shape)


def _eight_bits(values: Iterable[int]) -> int:
    """bitsandbytes' two moments of tensors of so many values, in bytes."""
    values = list(values)
    kept = [2 * (count + 4 * -(-count // BLOCK)) if count >= SMALLEST else 8 * count for count in values]
    return sum(kept) + (MAPS if max(values, default=0) >= SMALLEST else 0)


def _galore(name: str, shape: Shape, rank: int | float) -> tuple[int, int]:
    """Values of the projection on the smaller side, and of each moment of the projected gradient."""
    rows, cols = shape[0], prod(shape[1:])
    columns = LayerPlan(rank=rank).columns(rows, cols, name)
    return columns * min(rows, cols), columns * max(rows, cols)


def scratch_nbytes(
    optimizer: str,
    shapes: Shapes,
    dtype: torch.dtype,
    exclude: Sequence[str],
    rank: int | float,
    plans: Mapping[str, LayerPlan] | LayerPlan,
    fused: bool,
) -> int:
    """The most that a step holds for itself at one time, found by stepping on the meta device with the code that will step on the card.

    The fused AdamW and bitsandbytes' 8-bit one are single kernels that work in place: nothing. ``fused`` steps one parameter at a time.
    """
    if optimizer in ("adamw", "adamw8bit"):
        return 0
    matrices, rest = divide(shapes, exclude)
    if optimizer == "mango":
        stacks: dict[tuple[Shape, LayerPlan], int] = {}
        plain = [prod(shape) for shape in rest.values()]
        for name, shape in matrices.items():
            chosen = _plan(plans, name, shape)
            if chosen is None:
                plain.append(prod(shape))
            else:
                stacks[shape, chosen] = stacks.get((shape, chosen), 0) + 1
        together = max(plain, default=0) if fused else sum(plain)
        found = [_plain_step(together, dtype)] if together else [0]
        for (shape, plan), count in stacks.items():
            layers = 1 if fused else min(count, max(1, STACK_VALUES // prod(shape)))
            found.append(_stack_step(plan, shape, layers, dtype))
        return max(found)
    if optimizer == "adafactor":  # its foreach step forms the second moment of all parameters at once, in their dtype
        return dtype.itemsize * (max if fused else sum)(map(prod, shapes.values()))
    largest = max(matrices.values(), key=prod, default=None)  # Muon and GaLore go parameter by parameter
    # moments in eight bits are stepped in place: GaLore's peak, the SVD, is the same
    return 0 if largest is None else _peer_step(optimizer.removesuffix("8bit"), largest, dtype, rank)


@cache
def _stack_step(plan: LayerPlan, shape: Shape, layers: int, dtype: torch.dtype) -> int:
    device = torch.device("meta")
    matrices = layers * matrix_count(shape)
    stack = LayerStack(plan, matrix_shape(shape), matrices, device, "a parameter")
    params = [torch.empty(matrix_shape(shape), dtype=dtype, device=device) for _ in range(matrices)]
    matmul = "bfloat16" if prod(matrix_shape(shape)) >= HALVES_PAY else "float32"  # as "auto" chooses on the cards
    hyper = Hyper(1e-3, (0.9, 0.999), 1e-8, weight_decay=0.0, maximize=False, step=2, seeds=[(0, 2, 0)] * matrices, matmul=matmul)

    def step() -> None:
        stack.step(params, params, hyper, Workspace(device))

    return _peak(step, [*params, *stack.parts().values()])


@cache
def _plain_step(values: int, dtype: torch.dtype) -> int:
    param, first, second = (torch.empty(values, dtype=kind, device="meta") for kind in (dtype, torch.float32, torch.float32))
    hyper: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    return _peak(lambda: adamw([param], [param], [first], [second], [2], **hyper), [param, first, second])


@cache
def _peer_step(optimizer: str, shape: Shape, dtype: torch.dtype, rank: int | float) -> int:
    """Of a second step, when all of the state exists, with GaLore's SVD in it."""
    param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    param.grad = torch.empty_like(param)
    options: dict[str, Any] = {"rank": rank, "update_proj_gap": 1} if optimizer == "galore" else {}
    built = optim.build(optimizer, [("weight", param)], lr=1e-3, **options)
    built.step()
    return _peak(lambda: built.step(), [param, param.grad, *state_tensors(built)])


def _peak(step: Callable[[], Any], known: Iterable[Tensor]) -> int:
    watch = Watch()
    for tensor in known:
        watch.ignore(tensor)
    with watch:
        step()
    return max((sample[0] for sample in watch.samples), default=0)

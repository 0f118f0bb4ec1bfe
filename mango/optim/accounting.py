"""Bytes that an optimizer keeps between steps: of one that exists, and of Mango before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from mango.optim.chain import Chain
from mango.optim.layers import LayerStack
from mango.optim.plan import LayerPlan, is_matrix, matrix_count, matrix_shape


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every tensor in the optimizer's state; one that several parameters share comes as often."""
    members = optimizer.members if isinstance(optimizer, Chain) else [optimizer]
    for member in members:
        yield from tensors_in(list(member.state.values()))


def state_nbytes(optimizer: torch.optim.Optimizer) -> int:
    """Every byte of every tensor in the optimizer's state: moments, codes, scales, code maps, projections, errors.

    A tensor that several parameters share (bitsandbytes' code maps) counts once. Python numbers do not count.
    """
    # an allocation is identified by where it starts and how long it is; empty tensors have no address
    return sum({(t.data_ptr(), t.nbytes, t.device): t.nbytes for t in state_tensors(optimizer)}.values())


def state_of(optimizer: torch.optim.Optimizer, param: Tensor) -> Mapping[str, Any]:
    """What the optimizer keeps for one parameter; nothing before its first step."""
    if isinstance(optimizer, Chain):
        seen = {own: (member, inner) for member, pairs in zip(optimizer.members, optimizer._pairs, strict=True) for own, inner in pairs}
        if param not in seen:
            return {}
        optimizer, param = seen[param]
    return optimizer.state.get(param, {})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside mappings, lists and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)
    elif hasattr(value, "__dict__"):  # GaLore keeps its projection in an object
        yield from tensors_in(vars(value))


def layer_nbytes(shape: Sequence[int], plan: LayerPlan | None) -> int:
    """What ``Mango.nbytes`` will count for one parameter of this shape, in bytes.

    The state is formed on the meta device by the class that forms it in a step, so there is no second formula to keep in agreement.

    Raises: ConfigError when the plan's integer rank is above the smaller dimension.
    """
    return _layer_nbytes(tuple(shape), plan if is_matrix(shape) else None)


@cache
def _layer_nbytes(shape: tuple[int, ...], plan: LayerPlan | None) -> int:
    if plan is None:
        return 2 * prod(shape) * torch.float32.itemsize  # the two moments of plain AdamW
    stack = LayerStack(plan, matrix_shape(shape), matrix_count(shape), torch.device("meta"), "a parameter")
    return sum(part.nbytes for part in stack.parts().values())

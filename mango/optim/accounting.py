"""Bytes that an optimizer keeps between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mango.optim.chain import Chain


def state_nbytes(optimizer: torch.optim.Optimizer) -> int:
    """Every byte of every tensor in the optimizer's state: moments, codes, scales, code maps, projections, errors.

    A tensor that several parameters share (bitsandbytes' code maps) counts once. Python numbers do not count.
    """
    members = optimizer.members if isinstance(optimizer, Chain) else [optimizer]
    found: dict[tuple[int, int, torch.device], int] = {}
    for member in members:
        for tensor in _tensors(list(member.state.values())):
            # an allocation is identified by where it starts and how long it is; empty tensors have no address
            found[(tensor.data_ptr(), tensor.nbytes, tensor.device)] = tensor.nbytes
    return sum(found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    elif hasattr(value, "__dict__"):  # GaLore keeps its projection in an object
        yield from _tensors(vars(value))

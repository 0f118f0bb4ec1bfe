"""Scratch memory that is taken again in every step."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Workspace:
    """Scratch memory that the stacks of an optimizer share, by purpose: fresh pages cost a CPU as much as a pass over them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of this shape whose content is left over; it is valid until the purpose is asked for again."""
        values = prod(shape)
        held = self._held.get((purpose, dtype))
        if held is None or held.numel() < values:
            held = self._held[purpose, dtype] = torch.empty(values, dtype=dtype, device=self.device)
        return held[:values].view(shape)

    def match(self, other: Workspace) -> None:
        """Make room for whatever the other one has room for."""
        for (purpose, dtype), held in other._held.items():
            self.take(purpose, (held.numel(),), dtype).zero_()  # which makes the pages, too

"""Stepping inside the backward pass: each parameter is stepped when its gradient is complete, and the gradient is freed.

The idea is LOMO's (arXiv:2306.09782), which has to run the backward pass twice to clip by the global norm, and has no accumulation. Here
clipping uses the norm of the rounds before, and accumulation is a matter of saying so:

    for batch in batches[:-1]:
        with optimizer.accumulate():      # gradients add up in .grad, nothing is stepped
            loss(batch).backward()
    loss(batches[-1]).backward()          # each parameter is stepped and its gradient freed
    optimizer.step()                      # ends the round; parameters that the hooks did not reach are stepped here
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mango.optim.mango import Mango

MEMORY = 0.9  # of the running norm: ten rounds


class FusedBackward:
    """The hooks of one optimizer, and what they know about the round.

    Args:
        optimizer: whose parameters are stepped. Held weakly: the hooks of an optimizer that is gone do nothing.
        max_norm: gradients are scaled by min(1, max_norm / running norm), where the running norm is the mean of the global norms of the
            rounds before with weights 0.9^age; in the first round each gradient is clipped alone. None = no clipping.
    """

    def __init__(self, optimizer: Mango, max_norm: float | None) -> None:
        self._optimizer = ref(optimizer)
        self.max_norm = max_norm
        self.holding = False
        self._squares: list[Tensor] = []  # squared norms of this round's gradients
        self._begun = False
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self._handles = [param.register_post_accumulate_grad_hook(self._arrived) for param in params if param.requires_grad]

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Gradients that arrive meanwhile stay where they are."""
        before, self.holding = self.holding, True
        try:
            yield
        finally:
            self.holding = before

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or self.holding or param.grad is None:
            return
        if not self._begun:
            self._begun = True
            optimizer._diagnostics = {}
        self._clip(optimizer, param)
        optimizer._advance([param])
        param.grad = None

    def _clip(self, optimizer: Mango, param: Tensor) -> None:
        if self.max_norm is None or param.grad is None:
            return
        norm = torch.linalg.vector_norm(param.grad, dtype=torch.float32)
        self._squares.append(norm.square())
        running = optimizer.param_groups[0].get("running_norm")
        param.grad.mul_((self.max_norm / (norm if running is None else norm.new_tensor(running)).clamp_min(1e-30)).clamp_max(1.0))

    def finish(self) -> None:
        """The round is over: gradients that no hook took are clipped alike and left to the optimizer, the running norm moves on."""
        optimizer = self._optimizer()
        assert optimizer is not None
        left = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        if not self._begun:
            optimizer._diagnostics = {}
        for param in left:
            self._clip(optimizer, param)
        if self._squares:
            norm = float(torch.stack([square.to(self._squares[0].device) for square in self._squares]).sum().sqrt())
            group = optimizer.param_groups[0]  # there a checkpoint keeps it
            if norm < float("inf"):
                running = group.get("running_norm")
                group["running_norm"] = norm if running is None else MEMORY * running + (1.0 - MEMORY) * norm
        self._squares, self._begun = [], False

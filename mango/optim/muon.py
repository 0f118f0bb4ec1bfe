"""Muon with products in single precision, for processors without units for bfloat16, where torch's takes several times a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan 2024, kellerjordan.github.io/posts/muon) but for the type in which the iteration is computed.

    Momentum, Nesterov's look-ahead, the quintic iteration and the factor sqrt(max(1, rows / columns)) are torch's; so are the arguments,
    of which ``adjust_lr_fn`` must be left alone.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, params, grads, buffers)
            for param, grad, buffer in zip(params, grads, buffers, strict=True):
                buffer.lerp_(grad, 1 - group["momentum"])
                ahead = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                update = polar(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update.to(param.dtype), alpha=-group["lr"] * max(1.0, param.shape[0] / param.shape[1]) ** 0.5)
        return loss


def polar(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:  # (m, n) -> (m, n)
    """The matrix with its singular values moved near one by the Newton-Schulz iteration, in single precision."""
    a, b, c = coefficients
    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T

"""Muon: momentum, orthogonalised (Jordan 2024, https://kellerjordan.github.io/posts/muon/; Liu et al., arXiv:2502.16982).

torch's own Muon orthogonalises one matrix after another and always in bfloat16, which a processor without units for it emulates at a
twelfth of float32's speed. Here matrices of one shape are multiplied together, in bfloat16 only where there are units.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from mango.optim.base import loss_of
from mango.products import bfloat16_units, without_autocast


def polar(x: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315), eps: float = 1e-7) -> Tensor:
    """Newton-Schulz iterations towards the polar factor U Vᵀ of x = U S Vᵀ: singular values go to within about 0.3 of 1.

    Args:
        x: (…, m, n) float32, or bfloat16 to compute in it.
        steps, coefficients, eps: as of torch.optim.Muon.

    Returns:
        (…, m, n) in the type of x.
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT  # (…, m, m)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon, its options and its state, with batched products in the type that the device multiplies fast."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss, if there is a closure."""
        loss = loss_of(closure)
        for group in self.param_groups:
            stacks: dict[tuple[Any, ...], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    stacks.setdefault((param.shape, param.dtype, param.device), []).append(param)
            for params in stacks.values():
                self._step_stack(params, group)
        return loss

    def _step_stack(self, params: list[Tensor], group: dict[str, Any]) -> None:
        momentum, (rows, cols) = group["momentum"], params[0].shape
        updates = []
        for param in params:
            grad = param.grad
            assert grad is not None
            held = self.state[param].setdefault("momentum_buffer", torch.zeros_like(grad))
            held.lerp_(grad, 1.0 - momentum)
            updates.append(grad.lerp(held, momentum) if group["nesterov"] else held)
        dtype = torch.bfloat16 if bfloat16_units(params[0].device) else torch.float32
        with without_autocast(params[0]):
            orthogonal = polar(torch.stack(updates).to(dtype), group["ns_steps"], group["ns_coefficients"], group["eps"])
        lr, adjust = float(group["lr"]), group["adjust_lr_fn"]
        ratio = 0.2 * sqrt(max(rows, cols)) if adjust == "match_rms_adamw" else sqrt(max(1.0, rows / cols))
        torch._foreach_mul_(params, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(params, [update.to(params[0].dtype) for update in orthogonal.unbind()], alpha=-lr * ratio)

"""Plain AdamW with float32 moments, for the vectors, scalars and small matrices that are not worth compressing."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw


def step_group(
    group: Mapping[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor], states: MutableMapping[Tensor, dict[str, Any]]
) -> None:
    """One step of parameters with a group's options; their states are made when they are new."""
    for param in params:
        state = states[param]
        if "exp_avg_sq" not in state:
            zeros = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
            state.update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
        state["step"] += 1
    held = [states[param] for param in params]
    adamw(
        params,
        grads,
        [state["exp_avg"] for state in held],
        [state["exp_avg_sq"] for state in held],
        [state["step"] for state in held],
        lr=float(group["lr"]),
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group.get("maximize", False),
    )


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],  # float32, shapes of params
    exp_avg_sqs: Sequence[Tensor],  # float32, shapes of params
    steps: Sequence[int],  # after this step: 1 for the first
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step in place (arXiv:1711.05101): by torch's fused kernel on a CPU where all is float32 as it lies, which reads each value once;
    elsewhere for many tensors in a few kernels, as the fused one wants moments in the parameters' type.
    """
    if not params:
        return
    beta1, beta2 = betas
    if all(_usual(tensor) for tensors in (params, grads, exp_avgs, exp_avg_sqs) for tensor in tensors):
        before = [step - 1.0 for step in steps]  # the kernel's caller raises them
        counts = torch.tensor(before, device="cpu", dtype=torch.float32).unbind()
        torch_adamw(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            list(counts),
            fused=True,
            amsgrad=False,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
        )
        return
    wide = [grad.float() for grad in grads]
    if maximize:
        wide = list(torch._foreach_neg(wide))
    if weight_decay:
        torch._foreach_mul_(list(params), 1.0 - lr * weight_decay)
    torch._foreach_lerp_(list(exp_avgs), wide, 1.0 - beta1)
    torch._foreach_mul_(list(exp_avg_sqs), beta2)
    torch._foreach_addcmul_(list(exp_avg_sqs), wide, wide, 1.0 - beta2)
    denominators = torch._foreach_sqrt(list(exp_avg_sqs))
    torch._foreach_div_(denominators, [(1.0 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(list(exp_avgs), denominators)
    torch._foreach_mul_(updates, [-lr / (1.0 - beta1**step) for step in steps])
    torch._foreach_add_(list(params), [update.to(param.dtype) for update, param in zip(updates, params, strict=True)])


def _usual(tensor: Tensor) -> bool:
    return type(tensor.data) is Tensor and tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()

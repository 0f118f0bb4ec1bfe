"""The last step of a language model, from its features to the mean loss, a few tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mango.products import autocasts

CHUNK = 1024  # tokens whose logits exist at one time


def streamed_loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, chunk: int = CHUNK) -> Tensor:
    r"""Mean cross-entropy of the logits :math:`c \tanh(x W^\top / c)`, of which ``chunk`` rows exist at one time.

    With a vocabulary of tens of thousands the logits and their softmax take more memory than all blocks of a small model. Here the features
    alone are kept: the backward pass computes each chunk's logits again, one product with W more, as in Wijmans et al., arXiv:2411.09009.

    Args:
        x: (tokens, width).
        weight: W, (vocabulary, width).
        targets: (tokens,) int64.
        softcap: c.
        chunk: tokens.

    Returns: a scalar, float32.
    """
    loss: Tensor = _Streamed.apply(x, weight, targets, softcap, chunk)
    return loss


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float, chunk: int) -> Tensor:
        ctx.dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
        ctx.softcap, ctx.chunk = softcap, chunk
        ctx.save_for_backward(x, weight, targets)
        used = weight.to(ctx.dtype)
        losses = [
            functional.cross_entropy(_logits(part.to(ctx.dtype), used, softcap), wanted, reduction="sum")
            for part, wanted in zip(x.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.stack(losses).sum() / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets = ctx.saved_tensors
        used, dx = weight.to(ctx.dtype), torch.empty_like(x)
        dw = torch.zeros(weight.shape, dtype=torch.promote_types(ctx.dtype, torch.float32), device=weight.device)
        for part, wanted, into in zip(x.split(ctx.chunk), targets.split(ctx.chunk), dx.split(ctx.chunk), strict=True):
            part = part.to(ctx.dtype)
            logits = _logits(part, used, ctx.softcap)
            slope = (logits / ctx.softcap).square_().neg_().add_(1.0)  # of c tanh(z / c)
            d = logits.softmax(dim=1)
            d.scatter_add_(1, wanted.unsqueeze(1), torch.full_like(wanted, -1, dtype=d.dtype).unsqueeze(1))
            d = d.mul_(slope).mul_(dy / len(targets)).to(ctx.dtype)
            into.copy_(d @ used)
            dw.add_(d.mT @ part)
        return dx, dw.to(weight.dtype), None, None, None


def _logits(x: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """(tokens, vocabulary) float32, or float64 of float64."""
    z = x @ weight.mT
    return (z if z.dtype == torch.float64 else z.float()).div_(softcap).tanh_().mul_(softcap)

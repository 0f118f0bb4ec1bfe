"""A root-mean-square norm that keeps one tensor in the dtype of its input, where torch keeps a copy in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mango.mole.linear import adopt
from mango.mole.stores import Shared
from mango.products import autocasts


class MoleNorm(nn.RMSNorm):
    """y = x / rms(x) without a weight, over the last dimension.

    The backward pass is a function of the output: dx = (dy - y mean(dy y)) / rms. The output is what is kept, because often it is kept
    anyway (attention keeps normalised queries and keys), and one number a row. Converted layers that read the output read that tensor and
    keep no code of their own. In a 16-bit type gradients differ from torch's by rounding.

    Args:
        original: the norm it stands for.
        shared: of the conversion: told that the output is kept.
    """

    def __init__(self, original: nn.RMSNorm, shared: Shared) -> None:
        adopt(self, original)
        self.mole, self.shared = None, shared

    def forward(self, x: Tensor) -> Tensor:  # (…, features) -> (…, features)
        if autocasts(x):  # autocast chooses the dtype of a norm by itself
            return super().forward(x)
        y: Tensor = _Norm.apply(x, torch.finfo(x.dtype).eps if self.eps is None else self.eps)
        if y.requires_grad:  # then the backward pass keeps it
            self.shared.keep(y)
        return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (…, 1)
        y = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        wide = y.to(inverse.dtype)
        along = (dy * wide).mean(-1, keepdim=True)
        return (dy - wide * along).mul_(inverse).to(y.dtype), None


def convertible(module: nn.Module) -> bool:
    return type(module) is nn.RMSNorm and module.weight is None and len(module.normalized_shape) == 1

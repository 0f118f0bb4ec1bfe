"""The products of a converted layer beside that of its weight's gradient: forward, and back to its input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MULTIPLE = 16  # of which the units need both dimensions of a weight
VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2  # three bits of mantissa; two, but a range of 2^32 for gradients


def units(device: torch.device) -> bool:
    """Whether a device multiplies matrices of eight-bit floats in hardware; the meta device, on which memory is planned, stands for one."""
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, matmul: str) -> Tensor:
    """x Wᵀ + bias for x (…, inputs), (…, outputs)."""
    if matmul == "auto":
        return functional.linear(x, weight, bias)
    y = forward(x.reshape(-1, x.shape[-1]), weight, matmul).view(*x.shape[:-1], len(weight))
    return y if bias is None else y.add_(bias)


def forward(x: Tensor, weight: Tensor, matmul: str, out: Tensor | None = None) -> Tensor:
    """x Wᵀ (tokens, outputs) for x (tokens, inputs), W (outputs, inputs)."""
    if matmul == "auto":
        return torch.mm(x, weight.mT, out=out)
    y = scaled_mm(*quantise(x, VALUES), *quantise(weight, VALUES), x.dtype)
    return y if out is None else out.copy_(y)


def backward(dy: Tensor, weight: Tensor, matmul: str, out: Tensor | None = None, add: bool = False) -> Tensor:
    """dy W (tokens, inputs) for dy (tokens, outputs), W (outputs, inputs); ``add``: added to ``out``."""
    if matmul == "auto":
        return torch.mm(dy, weight, out=out) if out is None or not add else out.addmm_(dy, weight)
    codes, scale = quantise(weight, VALUES)
    dx = scaled_mm(*quantise(dy, GRADIENTS), codes.mT.contiguous(), scale, dy.dtype)
    if out is None:
        return dx
    return out.add_(dx) if add else out.copy_(dx)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Nearest eight-bit floats of x / scale, and the scale () float32 by which the largest value is the largest that there is.

    One scale for a tensor, from the tensor itself, as in arXiv:2209.05433 but without a history of earlier steps.
    """
    scale = x.abs().amax().float() / torch.finfo(dtype).max if x.numel() else torch.ones((), device=x.device, dtype=torch.float32)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)  # of zeros
    return (x * scale.reciprocal()).to(dtype).contiguous(), scale


def scaled_mm(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """scale_a scale_b a bᵀ in dtype (m, n), for codes a (m, k) and b (n, k); sums are in float32."""
    wide = dtype if dtype != torch.float64 else torch.float32
    return torch._scaled_mm(a, b.mT, scale_a, scale_b, out_dtype=wide).to(dtype)

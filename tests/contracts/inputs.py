"""Inputs that try to break a certificate, for every codec and compressor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((), (1,), (0,), (3, 0), (7,), (64,), (257,), (33, 17), (8, 4, 3, 3), (1, 300), (300, 1))


def adversarial(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Named matrices of this shape, finite in dtype and not zero."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=g)
    d = normal.numel()
    yield "normal", normal.to(dtype)
    yield "constant", torch.full(shape, -0.37).to(dtype)
    yield "one value", torch.zeros(shape).index_fill(0, torch.tensor([shape[0] // 2]), 1.0).mul(torch.arange(shape[1]) == 3).to(dtype)
    yield "heavy tail", (normal * torch.rand(shape, generator=g).pow(-2)).clamp(-1e4, 1e4).to(dtype)
    yield "offset", (normal * 1e-2 + 5).to(dtype)
    yield "flat spectrum", torch.eye(*shape).add(0.0).to(dtype)
    yield "rank one", torch.outer(torch.randn(shape[0], generator=g), torch.randn(shape[1], generator=g)).to(dtype)
    # one large value in every 64, the others in the middle of a gap: the worst case of an absmax codebook
    for name, level in (
        ("nf4 midpoint", 0.0455),
        ("nf4 negative midpoint", -0.045525018),
        ("int8 midpoint", 0.1140625),
        ("fp4", 0.0859375),
    ):
        yield name, torch.full((d,), level).index_fill(0, torch.arange(0, d, 64), 1.0).view(shape).to(dtype)
        yield f"-{name}", torch.full((d,), level).index_fill(0, torch.arange(0, d, 64), -1.0).view(shape).to(dtype)
    # plus and minus one with zeros between: the worst case of an affine group
    pair = torch.zeros(d)
    pair[::64], pair[1::64] = 1.0, -1.0
    yield "pair", pair.view(shape).to(dtype)
    yield "4/3 of a power of two", torch.full(shape, 4 / 3).to(dtype)
    noise = normal * 1e-6
    noise.view(-1)[::64] = 1.0
    yield "tiny noise", noise.to(dtype)
    if dtype != torch.float16:
        yield "huge", (normal * 1e30).to(dtype)
        yield "minute", (normal * 1e-30).to(dtype)
        yield "mixed magnitudes", (normal * torch.logspace(-20, 20, shape[0]).unsqueeze(1)).to(dtype)


def error_ratio(approximation: Tensor, x: Tensor) -> float:
    """||C(x) - x||^2 / ||x||^2 in float64, safe from overflow."""
    return float(error_ratios(approximation.unsqueeze(0), x.unsqueeze(0)))


def error_ratios(approximations: Tensor, x: Tensor) -> Tensor:
    """The same for each of a batch, (draws,)."""
    exact = x.double() / x.abs().max()
    error = approximations.double() / x.abs().max() - exact
    draws = len(x)
    return error.reshape(draws, -1).square().sum(1) / exact.reshape(draws, -1).square().sum(1)

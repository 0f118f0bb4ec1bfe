"""Products with a stack of large matrices, in the arithmetic that the processor is fastest in."""

from __future__ import annotations

import torch
from torch import Tensor

from mango import native
from mango.native.threads import run
from mango.workspace import Workspace

MOST = 1 << 17  # terms of which an int32 holds the sum, each at most 127²
TINY = 1e-36  # a row without a larger magnitude is taken as zero: the inverse of its scale would overflow


def large(a: Tensor, b: Tensor) -> bool:
    """Whether matrices of these sizes are better multiplied one by one than in a batch, on a CPU."""
    return a.device.type == "cpu" and a.numel() + b.numel() >= 1 << 17


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b. On a CPU large matrices of a stack are multiplied one by one: torch.bmm copies bfloat16 operands that are transposed."""
    if a.ndim != 3 or not large(a[0], b[0]):
        return torch.matmul(a, b) if out is None else torch.matmul(a, b, out=out)
    if out is None:
        out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=a.dtype)
    for one, other, result in zip(a, b, out, strict=True):
        torch.mm(one, other, out=result)
    return out


def square_sums(x: Tensor, minus: Tensor | None = None, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums of the squares of x - minus along each row, (layers, rows), and down each column, (layers, cols).

    x: (layers, rows, cols) float32; minus: the same in float32 or bfloat16, or None for zeros; left: where x - minus is written, if it is
    given, contiguous, in float32 or bfloat16, perhaps x or minus.
    """
    if not native.ready(x.device):
        if minus is not None:
            x = torch.sub(x, minus, out=left if left is not None and left.dtype == torch.float32 else None)
        if left is not None and left is not x:
            left.copy_(x)
        return torch.linalg.vector_norm(x, dim=-1).square_(), torch.linalg.vector_norm(x, dim=-2).square_()
    from mango.native import optim

    layers, rows, cols = x.shape
    bands = -(-rows // optim.BAND)
    along, down = torch.empty(layers, rows), torch.empty(layers, bands, cols)
    nothing = x.new_empty(layers, 0, cols)
    bits, shift = native.float_bits(nothing if minus is None else minus)
    into = nothing if left is None else left if left.dtype == torch.float32 else left.view(torch.int16)
    for values, other, by_row, by_band, out in zip(x.contiguous(), bits, along, down, into, strict=True):
        run(optim.missed, bands, optim.BAND * cols, values, other, shift, by_row, by_band, out)
    return along, down.sum(dim=1)


def to_bytes(x: Tensor, out: Tensor, summed: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """x (layers, rows, cols) float32 as codes in ``out``, int8 of that shape, and a scale for each row.

    Returns:
        The scales (layers, rows): codes * scale is within half a scale, 1/254 of the largest magnitude in its row, of x. And
        ``square_sums(x)``, found while the values are at hand, if ``summed``.
    """
    layers, rows, cols = x.shape
    if native.ready(x.device):
        from mango.native import optim

        bands = -(-rows // optim.BAND)
        scales, along = torch.empty(layers, rows), torch.empty(layers, rows)
        down = torch.empty(layers, bands if summed else 0, cols)
        for values, *written in zip(x.contiguous(), out, scales, along, down, strict=True):
            run(optim.to_bytes, bands, optim.BAND * cols, values, values.view(torch.int32), *written)
        return scales, (along, down.sum(dim=1)) if summed else None
    peak = x.abs().amax(dim=-1)
    inverse = torch.where(peak > TINY, torch.full_like(peak, 127.0) / peak, 0.0)  # 127.0 / peak would round twice
    out.copy_((x * inverse.unsqueeze(-1)).round_())
    return peak * (1.0 / 127.0), square_sums(x) if summed else None


class ByteMatrices:
    """A stack A (layers, m, n) as int8 with a scale for each row, or for each column, multiplied in integers: exactly, but for the
    rounding of both operands.

    Args:
        x: (layers, rows, cols) float32, finite.
        turned: whether A is x transposed; scales belong to the rows of x, so to the columns of A then.
        workspace: for the codes and for products.
        summed: also find ``sums``, those of ``square_sums(x)``, while the values are at hand.
    """

    def __init__(self, x: Tensor, turned: bool, workspace: Workspace, summed: bool = False) -> None:
        codes = workspace.take("low", tuple(x.shape), torch.int8)
        scales, self.sums = to_bytes(x, codes, summed)
        # (layers, 1), and the rest at most 1: products of small values with small scales would underflow
        self._largest = scales.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        self._scales = scales / self._largest
        self._a, self._turned, self._workspace = codes.mT if turned else codes, turned, workspace

    def left(self, x: Tensor) -> Tensor:
        """x A (layers, k, n) float32 for x (layers, k, m); valid until the next call."""
        return self._product(x, self._a, self._turned, "left")

    def right(self, x: Tensor, over: Tensor | None = None) -> Tensor:
        """x Aᵀ (layers, k, m) float32 for x (layers, k, n), valid until the next call; rows divided by ``over`` (layers, k)."""
        return self._product(x, self._a.mT, not self._turned, "right", over)

    def _product(self, x: Tensor, a: Tensor, apart: bool, purpose: str, over: Tensor | None = None) -> Tensor:
        """``apart``: whether A's scales belong to the result; otherwise they are part of the sums, and go into x before it is rounded."""
        workspace, scales, shape = self._workspace, self._scales.unsqueeze(-2), tuple(x.shape)
        codes = workspace.take("codes", shape, torch.int8)
        own, _ = to_bytes(x if apart else torch.mul(x, scales, out=workspace.take("scaled", shape)), codes)
        shape = (*x.shape[:-1], a.shape[-1])
        sums = workspace.take("sums", shape, torch.int32)
        for one, other, result in zip(codes, a, sums, strict=True):
            torch._int_mm(one, other, out=result)
        own = (own if over is None else own / over) * self._largest
        product = workspace.take(purpose, shape).copy_(sums).mul_(own.unsqueeze(-1))
        return product.mul_(scales) if apart else product

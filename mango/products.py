"""Products with a stack of large matrices, in the arithmetic that the processor is fastest in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import pairwise
from math import prod
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mango import native
from mango.native.threads import run
from mango.workspace import Workspace

MOST = 1 << 17  # terms of which an int32 holds the sum, each at most 127²
HALVES_PAY = 1 << 18  # values of a matrix from which products in bfloat16 or int8 are faster than the conversion costs
CACHED = 1 << 22  # bytes of a product that are taken at once before they are read
FEW = 48  # terms of a sum, and fewer, for which bfloat16 is faster than int8, whose sums take twice as long to write and to read
TINY = 1e-36  # a row without a larger magnitude is taken as zero: the inverse of its scale would overflow


def bfloat16_units(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware. The meta device stands for the cards of the planner, which do."""
    if device.type == "meta":
        return True
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def in_halves(shape: tuple[int, int], device: torch.device, matmul: str) -> bool:
    """Whether products of factors are taken in bfloat16, and those with H if not in int8."""
    if matmul in ("auto", "int8"):
        return prod(shape) >= HALVES_PAY and bfloat16_units(device)
    return matmul == "bfloat16"


def in_bytes(shape: tuple[int, int], rank: int, device: torch.device, matmul: str) -> bool:
    """Whether factors are lifted from the basis in int8, of which a CPU's units take twice as many as of bfloat16. Finding scales pays if
    compiled, and where the rank is not so small that a product takes no longer than its result takes to be written."""
    if device.type != "cpu" or max(shape) > MOST or min(*shape, rank) == 1:  # torch 2.13 misreads the strides of a side of one
        return False
    pays = prod(shape) >= HALVES_PAY and rank > FEW and torch.cpu._is_vnni_supported() and native.ready(device)
    return matmul == "int8" or (matmul == "auto" and pays)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; the meta device, on which memory is planned, has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, products on the device of x are taken in the types of their operands, which autocast would round."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def large(a: Tensor, b: Tensor) -> bool:
    """Whether matrices of these sizes are better multiplied one by one than in a batch, on a CPU."""
    return a.device.type == "cpu" and a.numel() + b.numel() >= 1 << 17


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b; of int8 the exact sums, int32.

    On a CPU large matrices of a stack are multiplied one by one: torch.bmm copies bfloat16 operands that are transposed, and knows no int8.
    A larger operand on the left is then read as it lies: transposed there, it costs up to half as much again in bfloat16 as on the right.
    """
    multiply = torch._int_mm if a.dtype == torch.int8 else torch.matmul
    if a.ndim != 3 or (multiply is torch.matmul and not large(a[0], b[0])):
        return multiply(a, b) if out is None else multiply(a, b, out=out)
    if out is None and a.dtype == torch.bfloat16 and a.stride(-1) != 1 and a[0].numel() > b[0].numel():
        return matmul(b.mT, a.mT).mT
    if out is None:
        out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.int32 if a.dtype == torch.int8 else a.dtype)
    for one, other, result in zip(a, b, out, strict=True):
        multiply(one, other, out=result)
    return out


class Product(NamedTuple):
    """A product of two factors, in the form that is cheapest to come by.

    Attributes:
        values: (layers, rows, cols) contiguous, in float32 or bfloat16; or sums of products of codes, int32.
        scales: what the sums are multiplied by, (layers, rows) and (layers, cols); None for floats.
    """

    values: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def floats(self, out: Tensor | None = None) -> Tensor:
        """The product in float32, or as it is in bfloat16; sums are scaled into ``out`` if it is given, float32."""
        if self.scales is None:
            return self.values
        out = torch.empty(self.values.shape, device=self.values.device) if out is None else out
        if not native.ready(out.device):
            return out.copy_(self.values).mul_(self.scales[0].unsqueeze(-1)).mul_(self.scales[1].unsqueeze(-2))
        from mango.native import optim

        for (sums, *scales), result in zip(self.split(), out, strict=True):
            run(optim.scaled, *sums.shape, sums, *scales, result)
        return out

    def split(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer what a compiled loop reads: bits and scales, without elements where there are none."""
        bits = native.float_bits(self.values)
        nothing = torch.empty(len(bits), 0)
        along, down = (nothing, nothing) if self.scales is None else self.scales
        return zip(bits, along, down, strict=True)


class FourBits(NamedTuple):
    """Where rows of blocks are stored by a codec of sixteen levels (mango.codecs.fourbit).

    Attributes:
        codes: (layers, rows, cols / 2) uint8.
        scales: (layers, rows, cols / block) float32.
        block: values that share a scale; it divides cols, and ``mango.native.jit.TILE``.
        thresholds: between levels, (15,).
        order: the codes of the levels, ascending, (16,).
    """

    codes: Tensor
    scales: Tensor
    block: int
    thresholds: Tensor
    order: Tensor

    def band(self, layers: slice, rows: slice) -> FourBits:
        return self._replace(codes=self.codes[layers, rows], scales=self.scales[layers, rows])


def square_sums(
    x: Tensor | Sequence[Tensor], minus: Product | None = None, left: Tensor | None = None, coded: FourBits | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of the squares of x - minus along each row, (layers, rows), and down each column, (layers, cols).

    x: (layers, rows, cols) float32 or bfloat16, perhaps one by one; minus: the same, or None for zeros; left: where x - minus is written,
    if it is given, contiguous, in float32 or bfloat16, perhaps into x or the floats of minus; coded: where it is stored besides, by the
    compiled loops alone and where minus is given.
    """
    assert coded is None or minus is not None
    if not native.ready(x[0].device):
        assert coded is None
        x = (x if isinstance(x, Tensor) else torch.stack(list(x))).float()
        if minus is not None:
            x = torch.sub(x, minus.floats(), out=left if left is not None and left.dtype == torch.float32 else None)
        if left is not None and left is not x:
            left.copy_(x)
        return torch.linalg.vector_norm(x, dim=-1).square_(), torch.linalg.vector_norm(x, dim=-2).square_()
    from mango.native import optim

    layers, rows, cols = len(x), *x[0].shape
    bands = -(-rows // optim.BAND)
    along, down = torch.empty(layers, rows), torch.empty(layers, bands, cols)
    nothing = torch.empty(layers, 0, cols)
    others = (Product(nothing) if minus is None else minus).split()
    into = native.float_bits(nothing if left is None else left)
    if coded is None:
        coded = FourBits(nothing.byte(), nothing, 64, nothing[0].view(-1), nothing[0].view(-1).byte())
    for values, other, by_row, by_band, out, codes, scales in zip(x, others, along, down, into, coded.codes, coded.scales, strict=True):
        written = (by_row, by_band, out, coded.block, codes, scales, coded.thresholds, coded.order)
        run(optim.missed, bands, optim.BAND * cols, native.float_bits(values.contiguous()), *other, *written)
    return along, down.sum(dim=1)


def to_bytes(x: Tensor | Sequence[Tensor], out: Tensor, summed: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """x (layers, rows, cols), float32 or bfloat16, as codes in ``out``, int8 of that shape, and a scale for each row.

    Returns:
        The scales (layers, rows): codes * scale is within half a scale, 1/254 of the largest magnitude in its row, of x. And
        ``square_sums(x)``, found while the values are at hand, if ``summed``.
    """
    layers, rows, cols = out.shape
    if native.ready(out.device):
        from mango.native import optim

        bands = -(-rows // optim.BAND)
        scales, along = torch.empty(layers, rows), torch.empty(layers, rows)
        down = torch.empty(layers, bands if summed else 0, cols)
        for values, *written in zip(x, out, scales, along, down, strict=True):
            run(optim.to_bytes, bands, optim.BAND * cols, native.float_bits(values.contiguous()), *written)
        return scales, (along, down.sum(dim=1)) if summed else None
    x = (x if isinstance(x, Tensor) else torch.stack(list(x))).float()
    return _codes(x, -1, out), square_sums(x) if summed else None


def to_bytes_down(x: Tensor, out: Tensor) -> Tensor:
    """The codes of ``to_bytes`` with a scale for each column. Returns the scales (layers, cols)."""
    layers, rows, cols = x.shape
    if not native.ready(x.device):
        return _codes(x, -2, out)
    from mango.native import optim

    scales = torch.empty(layers, cols)
    for values, codes, peaks in zip(x.contiguous(), out, scales, strict=True):
        run(optim.to_bytes_down, -(-cols // optim.TILE), optim.TILE * rows, values, values.view(torch.int32), codes, peaks)
    return scales


def _codes(x: Tensor, dim: int, out: Tensor) -> Tensor:
    """Codes of x in ``out``. Returns the scales, one for all that lies along ``dim``."""
    peak = x.abs().amax(dim=dim, keepdim=True)
    inverse = torch.where(peak > TINY, torch.full_like(peak, 127.0) / peak, 0.0)  # 127.0 / peak would round twice
    out.copy_((x * inverse).round_())
    return peak.squeeze(dim) * (1.0 / 127.0)


class Lift:
    """Products of a basis P (layers, m, r) with factors U (layers, r, n), as Mango's step takes them.

    Args:
        basis: float32 or bfloat16, the type of the products.
        turned: whether Uᵀ Pᵀ is wanted in the place of P U.
        integers: whether both are rounded to int8, P with a scale for each row and U for each column, and multiplied exactly then.
        workspace: for products, and for codes.
    """

    def __init__(self, basis: Tensor, turned: bool, integers: bool, workspace: Workspace) -> None:
        self._basis, self._turned, self._workspace = basis, turned, workspace
        self._scales: Tensor | None = None
        if integers:
            self._basis = workspace.take("basis codes", tuple(basis.shape), torch.int8)
            self._scales, _ = to_bytes(basis, self._basis)

    def products(self, factor: Tensor, whole: bool) -> Iterator[tuple[slice, slice, Product]]:
        """P U (layers, m, n), or turned.

        Yields:
            Which layers, which rows, and the product, valid until the next: all at once if it is wanted ``whole`` or fits a cache, and
            else in bands of a layer's rows that are still in a cache when they are read.
        """
        scales = None
        if self._scales is None:
            factor = factor.to(self._basis.dtype)
        else:
            codes = self._workspace.take("codes", tuple(factor.shape), torch.int8)
            scales = self._scales, to_bytes_down(factor, codes)
            factor = codes
        one, other = self._basis, factor
        if self._turned:
            one, other, scales = factor.mT, self._basis.mT, scales and scales[::-1]
        layers, rows, cols = len(one), one.shape[-2], other.shape[-1]
        kind = torch.int32 if scales else self._basis.dtype
        if whole or layers * rows * cols * kind.itemsize <= CACHED:
            yield slice(None), slice(None), Product(matmul(one, other, self._workspace.take("product", (layers, rows, cols), kind)), scales)
            return
        most = max(16, CACHED // (cols * kind.itemsize))  # rows of a band
        count = -(-rows // most)  # of bands of like size: torch 2.13 misreads the strides of a side of one
        for layer in range(layers):
            here = slice(layer, layer + 1)
            for first, last in pairwise(rows * number // count for number in range(count + 1)):
                band = slice(first, last)
                out = self._workspace.take("product", (1, last - first, cols), kind)
                matmul(one[layer, band], other[layer], out[0])
                yield here, band, Product(out, scales and (scales[0][here, band], scales[1][here]))


class ByteMatrices:
    """A stack A (layers, m, n) as int8 with a scale for each row, or for each column, multiplied in integers: exactly, but for the
    rounding of both operands.

    Args:
        x: (layers, rows, cols) float32 or bfloat16, finite, perhaps one by one.
        turned: whether A is x transposed; scales belong to the rows of x, so to the columns of A then.
        workspace: for the codes and for products.
        summed: also find ``sums``, those of ``square_sums(x)``, while the values are at hand.
    """

    def __init__(self, x: Tensor | Sequence[Tensor], turned: bool, workspace: Workspace, summed: bool = False) -> None:
        codes = workspace.take("low", (len(x), *x[0].shape), torch.int8)
        scales, self.sums = to_bytes(x, codes, summed)
        # (layers, 1), and the rest at most 1: products of small values with small scales would underflow
        self._largest = scales.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        self._scales = scales / self._largest
        self._a, self._turned, self._workspace = codes.mT if turned else codes, turned, workspace

    def __getitem__(self, index: tuple[EllipsisType, slice]) -> ByteMatrices:
        """A[..., columns], of the same codes; ``sums`` stay those of all."""
        part = copy(self)
        part._a = self._a[index]
        part._scales = self._scales[index] if self._turned else self._scales
        return part

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
        rows, cols = shape[-2], a.shape[-1]
        across = a.stride(-1) != 1 and rows > 1 and cols < a.shape[-2]  # then (A xᵀ)ᵀ is a quarter faster
        shape = (len(codes), cols, rows) if across else (len(codes), rows, cols)
        sums = workspace.take("sums", shape, torch.int32)
        matmul(*((a.mT, codes.mT) if across else (codes, a)), out=sums)
        own = (own if over is None else own / over) * self._largest
        other = self._scales if apart else torch.ones(len(codes), cols)
        product = Product(sums, (other, own) if across else (own, other)).floats(workspace.take(purpose, shape))
        return product.mT if across else product

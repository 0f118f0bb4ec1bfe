"""Products with a stack of large matrices, in the arithmetic that the processor is fastest in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
        kind = torch.int32 if a.dtype == torch.int8 else a.dtype
        out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=kind, device=a.device)
    for one, other, result in zip(a, b, out, strict=True):
        multiply(one, other, out=result)
    return out


class Product(NamedTuple):
    """A product of two factors, in the form that is cheapest to come by.

    Attributes:
        values: (layers, rows, cols) contiguous, or (rows, cols) of one layer, in float32 or bfloat16; or sums of products of codes, int32.
        scales: what the sums are multiplied by, (layers, rows) and (layers, cols), or (rows,) and (cols,); None for floats.
    """

    values: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def floats(self, out: Tensor | None = None) -> Tensor:
        """The product in float32, or as it is in bfloat16; sums are scaled into ``out`` if it is given, float32."""
        if self.scales is None:
            return self.values
        out = torch.empty(self.values.shape, device=self.values.device, dtype=torch.float32) if out is None else out
        if not native.ready(out.device):
            return out.copy_(self.values).mul_(self.scales[0].unsqueeze(-1)).mul_(self.scales[1].unsqueeze(-2))
        from mango.native import optim

        rows, cols = shape = self.values.shape[-2:]
        along, down = self.scales
        for each in zip(self.values.view(-1, *shape), along.view(-1, rows), down.view(-1, cols), out.view(-1, *shape), strict=True):
            run(optim.scaled, rows, cols, *each)
        return out

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a compiled loop reads of one layer: bits and scales, without elements where there are none."""
        return native.float_bits(self.values), *(self.scales or (NO_SCALES, NO_SCALES))


Part = tuple[int | slice, slice, Product]  # which layer, or layers, which rows, and their product


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

    def band(self, layer: int, rows: slice) -> FourBits:
        return self._replace(codes=self.codes[layer, rows], scales=self.scales[layer, rows])


NO_SCALES = torch.empty(0, device="cpu", dtype=torch.float32)
NO_PRODUCT = Product(torch.empty(0, 0, device="cpu", dtype=torch.float32))
NO_CODES = FourBits(torch.empty(0, 0, dtype=torch.uint8, device="cpu"), NO_PRODUCT.values, 64, NO_SCALES, NO_SCALES.byte())


def square_sums(x: Tensor | Sequence[Tensor], left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums of the squares of x along each row, (layers, rows), and down each column, (layers, cols).

    x: (layers, rows, cols) float32 or bfloat16, perhaps one by one; left: where x is written, if it is given, contiguous, in either.
    """
    if native.ready(x[0].device):
        along, down = _sums(len(x), *x[0].shape)
        for layer, matrix in enumerate(x):
            _missed(matrix.contiguous(), NO_PRODUCT, None if left is None else left[layer], NO_CODES, along[layer], down[layer])
        return along, down.sum(dim=1)
    x = (x if isinstance(x, Tensor) else torch.stack(list(x))).float()
    if left is not None:
        left.copy_(x)
    return torch.linalg.vector_norm(x, dim=-1).square_(), torch.linalg.vector_norm(x, dim=-2).square_()


def subtract(h: Tensor, products: Iterable[Part], coded: FourBits | None = None) -> tuple[Tensor, Tensor]:
    """h <- h - product for the products of all parts of h (layers, rows, cols), float32 or bfloat16. Returns ``square_sums(h)``.

    coded: where h is stored besides, by the compiled loops alone.
    """
    if native.ready(h.device):
        along, down = _sums(*h.shape)
        for layer, rows, product in products:
            assert isinstance(layer, int)
            bands = slice(rows.start // native.BAND, -(-rows.stop // native.BAND))
            matrix, into = h[layer, rows], NO_CODES if coded is None else coded.band(layer, rows)
            _missed(matrix, product, matrix, into, along[layer, rows], down[layer, bands])
        return along, down.sum(dim=1)
    assert coded is None
    for layers, rows, product in products:
        h[layers, rows] -= product.floats()
    return square_sums(h)


def _sums(layers: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Room for sums along rows (layers, rows), and down the columns of each band (layers, bands, cols)."""
    return _floats(layers, rows), _floats(layers, -(-rows // native.BAND), cols)


def _floats(*shape: int) -> Tensor:
    """What a compiled loop writes, whatever torch's default type and device are."""
    return torch.empty(shape, device="cpu", dtype=torch.float32)


def _missed(h: Tensor, product: Product, left: Tensor | None, coded: FourBits, along: Tensor, down: Tensor) -> None:
    """The loop ``missed`` for (bands of) one layer."""
    from mango.native import optim

    into = NO_PRODUCT.values if left is None else left
    read = native.float_bits(h), *product.read(), along, down, native.float_bits(into)
    run(optim.missed, len(down), native.BAND * h.shape[-1], *read, coded.block, *coded[:2], *coded[3:])


def to_bytes(x: Tensor | Sequence[Tensor], out: Tensor, summed: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """x (layers, rows, cols), float32 or bfloat16, as codes in ``out``, int8 of that shape, and a scale for each row.

    Returns:
        The scales (layers, rows): codes * scale is within half a scale, 1/254 of the largest magnitude in its row, of x. And
        ``square_sums(x)``, found while the values are at hand, if ``summed``.
    """
    layers, rows, cols = out.shape
    if native.ready(out.device):
        from mango.native import optim

        bands = -(-rows // native.BAND)
        scales, along, down = _floats(layers, rows), _floats(layers, rows), _floats(layers, bands if summed else 0, cols)
        for values, *written in zip(x, out, scales, along, down, strict=True):
            run(optim.to_bytes, bands, native.BAND * cols, native.float_bits(values.contiguous()), *written)
        return scales, (along, down.sum(dim=1)) if summed else None
    x = (x if isinstance(x, Tensor) else torch.stack(list(x))).float()
    return _codes(x, -1, out), square_sums(x) if summed else None


def to_bytes_down(x: Tensor, out: Tensor) -> Tensor:
    """The codes of ``to_bytes`` with a scale for each column. Returns the scales (layers, cols)."""
    layers, rows, cols = x.shape
    if not native.ready(x.device):
        return _codes(x, -2, out)
    from mango.native import optim

    scales = _floats(layers, cols)
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

    def times(self, number: float) -> Lift:
        """Products of the basis times a number, of the same codes if it was rounded to int8."""
        other = copy(self)
        if self._scales is None:
            other._basis = self._basis * number
        else:
            other._scales = self._scales * number
        return other

    def products(self, factor: Tensor, whole: bool) -> Iterator[Part]:
        """P U (layers, m, n), or turned: all at once if it is wanted ``whole``; or a layer at a time, and in bands of its rows that are
        still in a cache when they are read where that does not hold all layers. A product is valid until the next."""
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
        size = rows * cols * kind.itemsize
        if whole or layers * size <= CACHED:
            product = Product(matmul(one, other, self._workspace.take("product", (layers, rows, cols), kind)), scales)
            if whole:
                yield slice(None), slice(0, rows), product
            else:
                for layer in range(layers):
                    yield layer, slice(0, rows), Product(product.values[layer], scales and (scales[0][layer], scales[1][layer]))
            return
        least = max(1, rows // native.BAND)  # the last takes what is left, so none is of few rows: torch 2.13 misreads a side of one
        count = min(least, -(-size // CACHED))
        ends = [native.BAND * (least * number // count) for number in range(count)] + [rows]
        for layer in range(layers):
            for first, last in pairwise(ends):
                band = slice(first, last)
                out = self._workspace.take("product", (last - first, cols), kind)
                matmul(one[layer, band], other[layer], out)
                yield layer, band, Product(out, scales and (scales[0][layer, band], scales[1][layer]))


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
        other = self._scales if apart else torch.ones(len(codes), cols, device=codes.device, dtype=torch.float32)
        product = Product(sums, (other, own) if across else (own, other)).floats(workspace.take(purpose, shape))
        return product.mT if across else product

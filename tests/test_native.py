"""The compiled loops compute the bits of their torch twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mango import LayerPlan, Mango, codecs, native
from mango.codecs.fourbit import FourBit
from mango.codecs.int8 import code_table
from mango.draws import gaussian
from mango.errors import NonFinite
from mango.feedback.buffer import ErrorBuffer
from mango.mole import pair
from mango.native import codecs as bits
from mango.native import optim as loops
from mango.native import threads
from mango.native.jit import compiled
from mango.native.registers import BINS, PERMUTES, pack_signs
from mango.optim.guard import Guard
from mango.products import Part, Product, square_sums, subtract, to_bytes, to_bytes_down

Result = TypeVar("Result")
CPU = torch.device("cpu")
CODECS = ("int8", "nf4", "fp4", "int4", "int2")


def both(work: Callable[[], Result]) -> tuple[Result, Result]:
    """The result with the compiled loops and the result of torch alone."""
    assert native.ready(CPU), "numba is part of the set-up: the loops must be what is tested"
    compiled = work()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_installed", lambda: False)
        assert not native.ready(CPU)
        return compiled, work()


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, also where the sign of a zero differs."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(CODECS),
    block=st.sampled_from([8, 64, 256, 4096]),
    n=st.integers(0, 9000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([1.0, 1e-4, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_codes_scales_and_values_are_equal(name: str, block: int, n: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    x = (torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)
    check(name, block, x)


@pytest.mark.parametrize("name", CODECS)
def test_special_values_are_treated_alike(name: str) -> None:
    levels = torch.tensor(codecs.get("nf4").levels)
    middles = (levels[1:] + levels[:-1]) / 2
    most = 1e38 if name in ("int4", "int2") else 3e38  # whose difference must be a float too
    for x in (
        torch.zeros(200),
        torch.full((100,), 1e-39),
        torch.full((100,), -1e-45),
        torch.tensor([most, -most, 1e-38, 0.0, -0.0] * 40),
        torch.cat([torch.ones(1), middles, torch.nextafter(middles, torch.tensor(2.0)), torch.nextafter(middles, torch.tensor(-2.0))]),
        torch.linspace(-1, 1, 65535),
    ):
        check(name, 64, x)


def check(name: str, block: int, x: Tensor) -> None:
    codec = codecs.get(name, block=block)
    mine, twin = both(lambda: codec.encode(x, generator=torch.Generator().manual_seed(1)))
    assert all(same(a, b) for a, b in zip(mine.tensors(), twin.tensors(), strict=True))
    values, others = both(lambda: codec.decode(mine))
    assert same(values, others)


@settings(max_examples=40, deadline=None)
@given(
    block=st.sampled_from([8, 64, 256]),
    n=st.integers(1, 9000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([1.0, 1e-4, 1e4, 1e-38]),
    seed=st.integers(0, 2**31),
)
def test_pairs_are_equal(block: int, n: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    r = (torch.randn(1, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).clamp_(min=0).to(dtype)

    def work() -> list[Tensor]:
        torch.manual_seed(seed)
        saved = pair.save(r, block, "layer")
        return [*saved.tensors, pair.value(saved), pair.derivative(saved)]

    mine, twin = both(work)
    assert all(same(a, b) for a, b in zip(mine, twin, strict=True))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_that_are_looked_up_are_those_that_are_searched_for(name: str) -> None:
    codec = codecs.get(name)
    assert isinstance(codec, FourBit)
    thresholds, order = (part.numpy() for part in codec.thresholds())
    tables = [np.empty(BINS, kind) for kind in (np.float32, np.int32, np.int32)]
    assert bits.tabulate(thresholds[:0], order[:0], *tables) == 0, "nothing is read where no codes are wanted"
    bins = bits.tabulate(thresholds, order, *tables)
    assert bins == (BINS if PERMUTES and name == "nf4" else 0), "thresholds of FP4 are too near to one another"
    near = [np.nextafter(thresholds, np.float32(far)) for far in (-2.0, 2.0)]
    x = np.concatenate([thresholds, *near, [-1.0, 1.0, 0.0, -0.0], np.linspace(-1.0, 1.0, 10007)]).astype(np.float32)[:10048]
    found, looked_up, searched = (np.zeros(len(x), np.uint8) for _ in range(3))
    factor, unit = np.full(1, 0.5, np.float32), np.empty_like(x)
    for edges, pairs in ((tables[0][:bins], looked_up), (tables[0][:0], searched)):
        bits.nearest(x / factor, factor, thresholds, order, edges, *tables[1:], unit, found, pairs[: len(x) // 2])
    assert np.array_equal(looked_up, searched) and len(set(searched[: len(x) // 2])) > 15


def test_double_quantised_scales_are_equal() -> None:
    codec = codecs.get("nf4", double_quant=True)
    x = torch.randn(70000)
    mine, twin = both(lambda: codec.encode(x))
    assert all(same(a, b) for a, b in zip(mine.tensors(), twin.tensors(), strict=True))


@pytest.mark.parametrize("error", ["codec", "none"])
@pytest.mark.parametrize("matmul", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (64, 8, 3, 3)])
def test_a_step_of_mango_is_the_same_but_for_the_order_of_sums(error: str, matmul: str, shape: tuple[int, ...]) -> None:
    def train() -> Tensor:
        param = torch.nn.Parameter(gaussian((*shape, 1), (0,))[..., 0])
        optimizer = Mango([("w", param)], lr=0.1, plan=LayerPlan(rank=8, error=error), matmul=matmul, weight_decay=0.1)
        for step in range(3):
            param.grad = gaussian((*shape, 1), (1, step))[..., 0]
            optimizer.step()
        return param.detach()

    compiled, twin = both(train)
    start = gaussian((*shape, 1), (0,))[..., 0]
    assert float((compiled - twin).norm()) < 1e-3 * float((compiled - start).norm())


def test_the_error_is_decoded_and_added_with_the_bits_of_two_passes() -> None:
    buffer = ErrorBuffer("codec", "nf4", 2, (48, 64), CPU)
    buffer.keep(gaussian((2, 48, 64), (1,)))
    for sign, decay in ((1.0, 1.0), (-1.0, 1.0), (1.0, 0.9)):
        for dtype in (torch.float32, torch.bfloat16):
            given = (list(gaussian((2, 48, 64), (2,))), torch.empty(2, 48, 64, dtype=dtype), sign, decay)
            mine, twin = both(lambda given=given: buffer.compensate(*given).clone())
            assert same(mine, twin)


def test_signs_are_noted_where_registers_have_masks_for_them() -> None:
    def notes(kind: str, cols: int) -> bool:
        return ErrorBuffer(kind, "nf4", 2, (48, cols), CPU).notes_signs()

    assert notes("codec", 576) == PERMUTES
    assert not notes("codec", 96) and not notes("none", 64)


@pytest.mark.skipif(not PERMUTES, reason="signs are packed by AVX-512")
def test_noted_signs_are_those_of_the_gradients() -> None:
    buffer = ErrorBuffer("codec", "nf4", 2, (48, 576), CPU)  # a last tile of one block
    grads = gaussian((2, 48, 576), (1,))
    grads[0, :, ::3], grads[1, 5] = 0.0, -0.0
    grads[0, 1, 1], grads[1, 2, 2] = 1e-42, -1e-42  # subnormal
    noted = torch.empty(2, 48, 72, dtype=torch.int16)
    buffer.compensate(list(grads), torch.empty(2, 48, 576), signs=noted)
    bits = (noted.view(2, 48, 36, 2, 1) >> torch.arange(16, dtype=torch.int16)) & 1  # (…, of 16 values, below and above, value)
    assert torch.equal((bits[..., 1, :] - bits[..., 0, :]).view(2, 48, 576), grads.sign().to(torch.int16))


@pytest.mark.parametrize("codec", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pass_that_finds_the_error_stores_it_with_the_bits_of_its_codec(codec: str, dtype: torch.dtype) -> None:
    shape = (2, 130, 1088)  # a last band of two rows, a last tile of one block
    h = gaussian(shape, (1,))
    h[0, :2] = 0.0
    h[0, 2, 64:128], h[1, 3, :64] = 1e-40, 1e30
    h, minus = h.to(dtype), product(shape, torch.float32)
    minus.values[0, :3] = 0.0
    once, twice = (ErrorBuffer("codec", codec, 2, shape[1:], CPU) for _ in range(2))
    twice.keep(h.float() - minus.values)
    coded = once.coded()
    assert coded is not None
    subtract(h, parts_of(minus), coded)
    assert once.store is not None and twice.store is not None
    parts = zip(once.store.parts().values(), twice.store.parts().values(), strict=True)
    assert all(same(a, b) for a, b in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_stored_with_the_bits_of_their_codec_by_the_pass_that_finds_them(dtype: torch.dtype) -> None:
    rows, cols = 6, 1280  # the last tile is one block
    m, v, u = (gaussian((rows, cols), (seed,)) for seed in (1, 2, 3))
    u[0, :256] = m[0, :256] = v[0, :256] = 0.0
    numbers = (0.9, 0.999, 0.1, 0.001, 0.5, 0.25, 1e-8)
    read = (*(native.float_bits(moment.to(dtype)) for moment in (m, v.square())), u, torch.rand(rows), *numbers)
    table, nothing = code_table(), torch.empty(0, cols)
    adam, again, mean, root = (torch.empty(rows, cols) for _ in range(4))
    packs = [codecs.get("int8").encode(torch.zeros(rows, cols)) for _ in range(2)]
    parts = [part.view(rows, -1) for pack in packs for part in pack.tensors()]
    threads.run(loops.moments, rows, cols, *read, adam, mean, root, 256, table, *[nothing.byte(), nothing] * 2)
    threads.run(loops.moments, rows, cols, *read, again, nothing, nothing, 256, table, *parts)
    assert same(adam, again)
    for pack, values in zip(packs, (mean, root), strict=True):
        assert all(same(a, b) for a, b in zip(pack.tensors(), codecs.get("int8").encode(values).tensors(), strict=True))


def test_which_errors_are_stored_by_the_pass_that_finds_them() -> None:
    def coded(kind: str, codec: str, cols: int) -> bool:
        return ErrorBuffer(kind, codec, 2, (16, cols), CPU).coded() is not None

    assert coded("codec", "nf4", 192) and coded("codec", "fp4", 64)
    assert not coded("codec", "nf4", 96)  # a block would begin in one row and end in the next
    assert not coded("codec", "int8", 256) and not coded("gradient", "nf4", 64) and not coded("none", "nf4", 64)


@pytest.mark.parametrize("cols", [90, 1024, 2112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("left_dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_applied_with_the_bits_of_its_passes(cols: int, dtype: torch.dtype, left_dtype: torch.dtype) -> None:
    w, by_row, by_column = gaussian((70, cols), (1,)), gaussian((70,), (3,)), gaussian((cols,), (4,))
    left, plus = gaussian((70, cols), (2,)).to(left_dtype), product((1, 70, cols), dtype)
    g = gaussian((70, cols), (7,))
    g[:3] = 0.0
    x = left * by_row[:, None] * by_column + plus.floats()[0]
    expected = w * 0.875 + x * torch.where(x * g < 0, 1.6, 0.4)
    ((_, _, matrix),) = parts_of(plus, 70)
    added, *form = matrix.read()
    threads.run(loops.apply, 70, cols, w, native.float_bits(left), added, *form, by_row, by_column, g, 1.0, 0.875, 1.6, 0.4)
    assert same(w, expected)
    if cols % 16 == 0 and PERMUTES:
        again, noted = gaussian((70, cols), (1,)), torch.empty(70, cols // 8, dtype=torch.int16)
        threads.run(note, 70, cols, g, noted)
        threads.run(loops.apply, 70, cols, again, native.float_bits(left), added, *form, by_row, by_column, noted, 1.0, 0.875, 1.6, 0.4)
        assert same(again, expected)


@compiled
def note(first: int, last: int, g: np.ndarray, signs: np.ndarray) -> None:
    for i in range(first, last):
        for k in range(signs.shape[1] // 2):
            pack_signs(g[i], 16 * k, signs[i], 2 * k)


def product(shape: tuple[int, int, int], dtype: torch.dtype) -> Product:
    """Of random numbers, in each of the forms that a product may have."""
    layers, rows, cols = shape
    values = gaussian(shape, (2,))
    if dtype != torch.int32:
        return Product(values.to(dtype))
    return Product((values * 1e4).to(dtype), (gaussian((layers, rows), (5,)) * 1e-2, gaussian((layers, cols), (6,)) * 1e-2))


def parts_of(found: Product, band: int = 128) -> list[Part]:
    """Products of bands of rows, a layer at a time."""
    layers, rows, _ = found.values.shape
    parts = []
    for layer in range(layers):
        for first in range(0, rows, band):
            here = slice(first, min(first + band, rows))
            parts.append(
                (layer, here, Product(found.values[layer, here], found.scales and (found.scales[0][layer, here], found.scales[1][layer])))
            )
    return parts


def test_sums_of_codes_are_scaled_alike() -> None:
    found = product((2, 130, 1100), torch.int32)
    assert same(*both(found.floats))
    assert same(*both(lambda: found.floats(torch.empty(2, 130, 1100))))


def test_columns_become_bytes_alike() -> None:
    x = gaussian((2, 130, 1100), (1,)) * gaussian((2, 1, 1100), (2,)).mul(20.0).exp()
    x[0, :, :5] = 0.0
    x[1, :, 0] = 1e-40

    def work() -> tuple[Tensor, ...]:
        codes = torch.empty_like(x, dtype=torch.int8)
        return codes, to_bytes_down(x, codes)

    mine, twin = both(work)
    assert all(same(a, b) for a, b in zip(mine, twin, strict=True))
    rows, scales = torch.empty(2, 1100, 130, dtype=torch.int8), mine[1]
    assert torch.equal(scales, to_bytes(x.mT.contiguous(), rows)[0]) and torch.equal(mine[0], rows.mT)


def test_rows_become_bytes_alike() -> None:
    x = gaussian((2, 300, 1100), (1,)) * gaussian((2, 300, 1), (2,)).mul(20.0).exp()
    x[0, :5] = 0.0
    x[1, 0] = 1e-40

    def work() -> tuple[Tensor, ...]:
        codes = torch.empty_like(x, dtype=torch.int8)
        scales, sums = to_bytes(x, codes, summed=True)
        assert sums is not None
        return codes, scales, *sums

    mine, twin = both(work)
    assert all(same(a, b) for a, b in zip(mine[:2], twin[:2], strict=True))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(mine[2:], twin[2:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("rough", [False, True])
def test_what_is_left_of_a_matrix_is_written_and_its_squares_are_summed(dtype: torch.dtype, rough: bool) -> None:
    x = gaussian((2, 300, 1100), (1,)).to(torch.bfloat16 if rough else torch.float32)
    away = product((2, 300, 1100), dtype)
    exact = x.float() - away.floats()
    rows, columns = subtract(x, parts_of(away))
    assert torch.allclose(rows, exact.double().square().sum(-1).float(), rtol=1e-5)
    assert torch.allclose(columns, exact.double().square().sum(-2).float(), rtol=1e-5)
    assert torch.equal(x, exact.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left_dtype", [None, torch.float32, torch.bfloat16])
def test_squares_are_summed_while_a_matrix_is_converted(dtype: torch.dtype, left_dtype: torch.dtype | None) -> None:
    x = gaussian((2, 300, 1100), (1,)).to(dtype)
    left = None if left_dtype is None else torch.empty(x.shape, dtype=left_dtype)
    for form in (x, list(x)):
        for rows, columns in both(lambda form=form: square_sums(form, left)):
            assert torch.allclose(rows, x.double().square().sum(-1).float(), rtol=1e-5)
            assert torch.allclose(columns, x.double().square().sum(-2).float(), rtol=1e-5)
            assert left is None or torch.equal(left, x.to(left.dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_seen_wherever_it_is(value: float) -> None:
    for size, place in ((1, 0), (4096, 4095), (10_000, 9_999), (10_000, 5_000)):
        grad = torch.zeros(size)
        grad[place] = value
        with pytest.raises(NonFinite, match="the gradient of w holds"):
            Guard().admit([torch.ones(7), grad], ["v", "w"])

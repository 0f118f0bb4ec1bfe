"""The passes of Mango's step over whole matrices, each in one sweep where torch makes several.

``compensate`` and ``apply`` compute the bits of their torch twins; ``missed`` adds and ``moments`` rounds in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mango.native import BAND
from mango.native.codecs import HALF, MAGNITUDE, NONE, ONE, TINY, ZERO, expand, largest, look_up, nearest, single, store, tabulate
from mango.native.jit import PAIRS, TILE, as_float, compiled, scratch, summing
from mango.native.registers import BINS, WIDTH, pack_signs, unpack_signs

Array = np.ndarray[Any, np.dtype[Any]]
BYTE, PER_BYTE, SMALLEST = np.float32(127.0), np.float32(1.0 / 127.0), np.float32(1e-36)  # of mango.products.to_bytes


@compiled
def compensate(
    first: int,
    last: int,
    codes: Array,
    scales: Array,
    block: int,
    pairs: Array,
    g: Array,
    sign: float,
    out: Array,
    decay: float,
    signs: Array,
) -> None:
    """out = decay * decode(codes) + sign * g, blocks ``first`` to ``last``; see ``decode_nibbles``.

    g: (n,) float32, whole blocks; out: (n,), float32 as int32, or int16 for the upper halves, rounded to bfloat16; signs: (n / 8,) int16,
    the signs of g as of ``pack_signs``, or without elements.
    """
    wide, bits = scratch(PAIRS, np.float64), scratch(TILE, np.int32)
    levels, factors = scratch(WIDTH, np.float32), scratch(TILE, np.float32)
    level, sums = wide.view(np.float32), bits.view(np.float32)
    single(pairs, levels)
    for begin in range(first * block, last * block, TILE):
        end = min(begin + TILE, last * block)
        grads = g[begin:end]
        expand(codes[begin // 2 : end // 2], pairs, levels, wide)
        for b in range(begin // block, (end + block - 1) // block):
            factors[max(b * block - begin, 0) : (b + 1) * block - begin] = scales[b] if scales[b] > TINY else ZERO
        for i in range(grads.size):
            sums[i] = level[i] * factors[i] * decay + sign * grads[i]
        if signs.size:
            for k in range(grads.size // WIDTH):
                pack_signs(grads, WIDTH * k, signs, begin // 8 + 2 * k)
        store(bits, out[begin:end])


@compiled
def missed(
    first: int,
    last: int,
    h: Array,
    product: Array,
    along: Array,
    down: Array,
    rows: Array,
    columns: Array,
    left: Array,
    block: int,
    codes: Array,
    scales: Array,
    thresholds: Array,
    order: Array,
) -> None:
    """Sums of the squares of h - product (rows, cols), bands ``first`` to ``last`` of BAND rows.

    h: float32 as int32, or the bits of bfloat16 as int16.
    product: the same; or int32 that is multiplied by along (rows,) and down (cols,), float32, where those have elements; without rows it
    stands for zeros.
    rows: (rows,) float32, along each row, written; columns: (bands, cols) float32, down each column of a band, written. Whoever adds the
    bands gets one result for any number of threads; torch's reduction over columns is ten times slower.
    left: h - product is written there as bits like h's, perhaps into h or the product, unless it has no rows.
    codes, scales: (rows, cols / 2) uint8 and (rows, cols / block) float32: h - product in four bits, unless they have no rows or h is
    float32 and the product has none; thresholds and order are those of ``encode_nibbles``.
    """
    bits = scratch(TILE, np.int32)
    floats = bits.view(np.float32)
    unit, inverse, found = scratch(TILE, np.float32), scratch(TILE, np.float32), scratch(TILE, np.uint8)
    edges, lower, upper = scratch(BINS, np.float32), scratch(BINS, np.int32), scratch(BINS, np.int32)
    edges = edges[: tabulate(thresholds, order, edges, lower, upper)]
    for band in range(first, last):
        columns[band] = ZERO
        for i in range(band * BAND, min((band + 1) * BAND, h.shape[0])):
            total = ZERO
            for begin in range(0, h.shape[1], TILE):
                end = min(begin + TILE, h.shape[1])
                sums = columns[band, begin:end]
                if h.itemsize == 4 and not product.shape[0]:  # as it lies: a copy of what lies in memory takes longer than all the rest
                    total += _add_squares(h[i, begin:end].view(np.float32), sums)
                    if left.shape[0]:
                        store(h[i, begin:end], left[i, begin:end])
                    continue
                values = floats[: end - begin]
                if product.shape[0]:
                    _subtract(h[i, begin:end], product[i, begin:end], along, i, down[begin:end], values)
                else:
                    _floats(h[i, begin:end], values)
                total += _add_squares(values, sums)
                if left.shape[0]:
                    store(bits[: end - begin], left[i, begin:end])
                if codes.shape[0]:
                    peaks = scales[i, begin // block : end // block]
                    _invert_peaks(bits, block, peaks, inverse)
                    into = codes[i, begin // 2 : end // 2]
                    nearest(values, inverse[: peaks.size], thresholds, order, edges, lower, upper, unit, found, into)
            rows[i] = total


@compiled
def _subtract(bits: Array, product: Array, along: Array, row: int, down: Array, values: Array) -> None:
    """values = h - product for a part of a row: in one loop, since memory is the faster the more arrays are read side by side."""
    high, low = _shift(bits), _shift(product)
    if down.size:
        scale = along[row]
        for j in range(values.size):
            values[j] = _float(bits[j], high) - np.float32(product[j]) * scale * down[j]
    else:
        for j in range(values.size):
            values[j] = _float(bits[j], high) - _float(product[j], low)


@compiled
def _invert_peaks(bits: Array, block: int, scales: Array, inverse: Array) -> None:
    """The largest magnitude of each block, and what its values are multiplied by in ``encode_nibbles``. bits: the values as int32.

    In two loops, and codes are found in a third: block by block each product would wait for its division, and that for its search.
    """
    peaks = scales.view(np.int32)
    for b in range(peaks.size):
        peaks[b] = largest(bits, b * block, (b + 1) * block)
    for b in range(peaks.size):
        inverse[b] = ONE / max(scales[b], TINY)


@compiled
def _shift(bits: Array) -> Any:
    """How far the bits of an array are shifted to be those of float32: of bfloat16, int16, they are the upper half."""
    return HALF if bits.itemsize == 2 else NONE


@compiled
def _wide(bits: int, shift: int) -> Any:
    return np.int32(np.int32(bits) << shift)


@compiled
def _float(bits: int, shift: int) -> Any:
    return as_float(_wide(bits, shift))


@compiled
def _floats(bits: Array, values: Array) -> None:
    """values (n,) float32 of these bits."""
    shift = _shift(bits)
    for j in range(values.size):
        values[j] = _float(bits[j], shift)


@compiled
def scaled(first: int, last: int, sums: Array, along: Array, down: Array, out: Array) -> None:
    """out (rows, cols) float32 = sums along down, int32, (rows,) and (cols,) float32, rows ``first`` to ``last``."""
    for i in range(first, last):
        row, values, scale = sums[i], out[i], along[i]
        for j in range(values.size):
            values[j] = np.float32(row[j]) * scale * down[j]


@summing
def _add_squares(values: Array, sums: Array) -> Any:
    """sums += values²; returns what is added."""
    total = ZERO
    for j in range(values.size):
        square = values[j] * values[j]
        sums[j] += square
        total += square
    return total


@compiled
def to_bytes(first: int, last: int, x: Array, codes: Array, scales: Array, rows: Array, columns: Array) -> None:
    """codes = x * (127 / peak) to the nearest integer, and peak / 127 for each row, bands as of ``missed``.

    x: (rows, cols), finite, float32 as int32, or the bits of bfloat16 as int16; codes: int8, written; scales: (rows,) float32, written.
    rows, columns: sums of the squares of x as of ``missed``, unless there are no columns.
    """
    floats = scratch(TILE, np.float32)
    shift = _shift(x)
    for band in range(first, last):
        if columns.shape[0]:
            columns[band] = ZERO
        for i in range(band * BAND, min((band + 1) * BAND, x.shape[0])):
            most, total = NONE, ZERO
            for begin in range(0, x.shape[1], TILE):
                bits = x[i, begin : begin + TILE]
                for j in range(bits.size):
                    most = max(most, np.int32(_wide(bits[j], shift) & MAGNITUDE))
                if columns.shape[0]:
                    _floats(bits, floats[: bits.size])
                    total += _add_squares(floats[: bits.size], columns[band, begin : begin + TILE])
            peak = as_float(most)
            inverse = BYTE / peak if peak > SMALLEST else ZERO
            for begin in range(0, x.shape[1], TILE):
                bits, found = x[i, begin : begin + TILE], codes[i, begin : begin + TILE]
                for j in range(found.size):
                    found[j] = np.int8(np.int32(np.rint(_float(bits[j], shift) * inverse)))
            scales[i] = peak * PER_BYTE
            if columns.shape[0]:
                rows[i] = total


@compiled
def to_bytes_down(first: int, last: int, x: Array, bits: Array, codes: Array, scales: Array) -> None:
    """``to_bytes`` with a scale for each column, tiles ``first`` to ``last`` of TILE columns. scales: (cols,) float32, written."""
    most = scratch(TILE, np.int32)
    inverse = scratch(TILE, np.float32)
    for tile in range(first, last):
        begin, end = tile * TILE, min((tile + 1) * TILE, x.shape[1])
        peaks, factors, written = most[: end - begin], inverse[: end - begin], scales[begin:end]
        peaks[:] = NONE
        for i in range(x.shape[0]):
            magnitudes = bits[i, begin:end]
            for j in range(magnitudes.size):
                peaks[j] = max(peaks[j], np.int32(magnitudes[j] & MAGNITUDE))
        floats = peaks.view(np.float32)
        for j in range(floats.size):
            peak = floats[j]
            factors[j] = BYTE / peak if peak > SMALLEST else ZERO
            written[j] = peak * PER_BYTE
        for i in range(x.shape[0]):
            values, found = x[i, begin:end], codes[i, begin:end]
            for j in range(values.size):
                found[j] = np.int8(np.int32(np.rint(values[j] * factors[j])))


@compiled
def apply(
    first: int,
    last: int,
    w: Array,
    left: Array,
    plus: Array,
    along: Array,
    down: Array,
    by_row: Array,
    by_column: Array,
    g: Array,
    sign: float,
    decay: float,
    longer: float,
    shorter: float,
) -> None:
    """w = decay w + x (longer where x sign g < 0, else shorter), x = by_row left by_column + plus, rows ``first`` to ``last``.

    w: (rows, cols) float32; plus, along, down: as the product of ``missed``; left: likewise, of floats; by_row: (rows,), by_column:
    (cols,), float32; g: (rows, cols) float32, or the signs of that as of ``pack_signs``, (rows, cols / 8) int16; sign: 1, or -1 where g is
    ascended.
    """
    signs = scratch(TILE, np.float32)
    for i in range(first, last):
        height = along[i] if down.size else ZERO
        if g.itemsize == 4:
            _step_row(w[i], left[i], plus[i], height, down, by_row[i], by_column, g[i], sign, decay, longer, shorter)
            continue
        for begin in range(0, w.shape[1], TILE):
            here = slice(begin, min(begin + TILE, w.shape[1]))
            a, weights, slope = left[i, here], w[i, here], signs[: here.stop - begin]
            for k in range(slope.size // WIDTH):
                unpack_signs(g[i], begin // 8 + 2 * k, slope, WIDTH * k)
            _step_row(weights, a, plus[i, here], height, down[here], by_row[i], by_column[here], slope, sign, decay, longer, shorter)


@compiled
def _step_row(
    weights: Array,
    bits: Array,
    added: Array,
    height: float,
    down: Array,
    scale: float,
    by_column: Array,
    slope: Array,
    sign: float,
    decay: float,
    longer: float,
    shorter: float,
) -> None:
    """``apply`` for (part of) a row."""
    high, low = _shift(bits), _shift(added)
    if down.size:
        for j in range(weights.size):
            x = _float(bits[j], high) * scale * by_column[j] + np.float32(added[j]) * height * down[j]
            weights[j] = _stepped(weights[j], x, slope[j] * sign, decay, longer, shorter)
    else:
        for j in range(weights.size):
            x = _float(bits[j], high) * scale * by_column[j] + _float(added[j], low)
            weights[j] = _stepped(weights[j], x, slope[j] * sign, decay, longer, shorter)


@compiled
def _stepped(weight: float, x: float, up: float, decay: float, longer: float, shorter: float) -> Any:
    agrees = ((x < ZERO) != (up < ZERO)) & (up != ZERO)  # or x is zero, and nothing depends on it
    return weight * decay + x * (longer if agrees else shorter)


@compiled
def moments(
    first: int,
    last: int,
    m: Array,
    v: Array,
    u: Array,
    new: Array,
    beta1: float,
    beta2: float,
    old1: float,
    old2: float,
    unbias1: float,
    unbias2: float,
    eps: float,
    adam: Array,
    mean: Array,
    root: Array,
    block: int,
    table: Array,
    mean_codes: Array,
    mean_scales: Array,
    root_codes: Array,
    root_scales: Array,
) -> None:
    """Adam's moments and direction, rows ``first`` to ``last`` of (rows, n).

    mean = beta1 m + c1 u and root = sqrt(beta2 v + c2 u u), with c = (1 - beta) + new old;
    adam = (mean / unbias1) / (root / unbias2 + eps).
    m, v: as the product of ``missed``; u: float32; new: (rows,) float32; adam: float32, written; mean, root: likewise, or without rows.
    Then they are written as codes (rows, n) uint8 and scales (rows, n / block) float32 of ``encode_bytes``, whose table is given.
    """
    wide, other, entry = scratch(TILE, np.int32), scratch(TILE, np.int32), scratch(TILE, np.int32)
    one, two = wide.view(np.float32), other.view(np.float32)
    high, low = _shift(m), _shift(v)
    for i in range(first, last):
        c1, c2 = (ONE - beta1) + new[i] * old1, (ONE - beta2) + new[i] * old2
        for begin in range(0, u.shape[1], TILE):
            end = min(begin + TILE, u.shape[1])
            firsts, seconds, values, found = m[i, begin:end], v[i, begin:end], u[i, begin:end], adam[i, begin:end]
            for j in range(values.size):
                x = values[j]
                one[j] = beta1 * _float(firsts[j], high) + c1 * x
                two[j] = np.sqrt(beta2 * _float(seconds[j], low) + c2 * (x * x))
                found[j] = (one[j] / unbias1) / (two[j] / unbias2 + eps)
            if mean.shape[0]:
                means, roots = mean[i, begin:end], root[i, begin:end]
                for j in range(values.size):
                    means[j] = one[j]
                    roots[j] = two[j]
            else:
                for b in range(begin // block, end // block):
                    here, there = b * block - begin, (b + 1) * block - begin
                    _store_bytes(wide[here:there], one[here:there], table, entry, mean_codes[i], mean_scales[i], b, block)
                    _store_bytes(other[here:there], two[here:there], table, entry, root_codes[i], root_scales[i], b, block)


@compiled
def _store_bytes(bits: Array, values: Array, table: Array, entry: Array, codes: Array, scales: Array, b: int, block: int) -> None:
    """Block b of a row in bytes. bits: the values as int32."""
    scales[b : b + 1].view(np.int32)[0] = largest(bits, 0, bits.size)
    look_up(values, scales[b], table, entry, codes[b * block : (b + 1) * block])

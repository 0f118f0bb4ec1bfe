"""The passes of Mango's step over whole matrices, each in one sweep where torch makes several.

``compensate`` and ``apply`` compute the bits of their torch twins; ``missed`` adds and ``moments`` rounds in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mango.native.codecs import ONE, TINY, ZERO
from mango.native.jit import compiled, summing

Array = np.ndarray[Any, np.dtype[Any]]
BAND = 64  # rows whose columns are summed together
TILE = 512  # columns of a row that are worked on together: a few of them fit the fastest cache


@compiled
def compensate(
    first: int, last: int, codes: Array, scales: Array, block: int, pairs: Array, g: Array, sign: float, out: Array, decay: float
) -> None:
    """out = decay * decode(codes) + sign * g, blocks ``first`` to ``last``. g, out: (n,) float32, whole blocks; see ``decode_nibbles``."""
    wide = np.empty(block // 2, np.float64)
    level = wide.view(np.float32)
    for b in range(first, last):
        begin, end = b * block, (b + 1) * block
        found, values, grads = codes[begin // 2 : end // 2], out[begin:end], g[begin:end]
        scale = scales[b] if scales[b] > TINY else ZERO
        for k in range(found.size):
            wide[k] = pairs[found[k]]
        for i in range(values.size):
            values[i] = level[i] * scale * decay + sign * grads[i]


@compiled
def missed(first: int, last: int, h: Array, product: Array, shift: int, rows: Array, columns: Array, left: Array) -> None:
    """Sums of the squares of h - product (rows, cols), bands ``first`` to ``last`` of BAND rows.

    product: the bits of bfloat16 as int16 with ``shift`` 16, or of float32 as int32 with 0; without rows it stands for zeros.
    rows: (rows,) float32, along each row, written; columns: (bands, cols) float32, down each column of a band, written. Whoever adds the
    bands gets one result for any number of threads; torch's reduction over columns is ten times slower.
    left: h - product is written there unless it has no rows; it may be h.
    """
    wide = np.empty(TILE, np.int32)
    found = wide.view(np.float32)
    for band in range(first, last):
        columns[band] = ZERO
        for i in range(band * BAND, min((band + 1) * BAND, h.shape[0])):
            total = ZERO
            for begin in range(0, h.shape[1], TILE):
                end = min(begin + TILE, h.shape[1])
                values, sums, difference = h[i, begin:end], columns[band, begin:end], found[: end - begin]
                if product.shape[0]:
                    _widen(product[i, begin:end], shift, wide)
                    for j in range(values.size):
                        difference[j] = values[j] - difference[j]
                else:
                    difference = values
                for j in range(values.size):
                    sums[j] += difference[j] * difference[j]
                total += _sum_of_squares(difference)
                if left.shape[0]:
                    out = left[i, begin:end]
                    for j in range(values.size):
                        out[j] = difference[j]
            rows[i] = total


@compiled
def _widen(bits: Array, shift: int, wide: Array) -> None:
    """The bits of float32, as int32: of bfloat16 they are the upper half."""
    for j in range(bits.size):
        wide[j] = np.int32(bits[j]) << shift


@summing
def _sum_of_squares(values: Array) -> Any:
    total = ZERO
    for j in range(values.size):
        total += values[j] * values[j]
    return total


@compiled
def apply(
    first: int, last: int, w: Array, h: Array, minus: Array, plus: Array, shift: int, by_row: Array, by_column: Array, decay: float
) -> None:
    """w = decay w + (by_row (h - minus) by_column + plus), rows ``first`` to ``last`` of (rows, cols).

    w, h: float32; minus, plus: as the product of ``missed``, ``minus`` perhaps without rows; by_row: (rows,), by_column: (cols,), float32.
    """
    wide, other = np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    less, added = wide.view(np.float32), other.view(np.float32)
    for i in range(first, last):
        scale = by_row[i]
        for begin in range(0, w.shape[1], TILE):
            end = min(begin + TILE, w.shape[1])
            weights, left, along = w[i, begin:end], h[i, begin:end], by_column[begin:end]
            if minus.shape[0]:
                _widen(minus[i, begin:end], shift, wide)
                for j in range(left.size):
                    less[j] = left[j] - less[j]
                left = less
            _widen(plus[i, begin:end], shift, other)
            for j in range(weights.size):
                weights[j] = weights[j] * decay + (left[j] * scale * along[j] + added[j])


@compiled
def moments(
    first: int, last: int, m: Array, v: Array, u: Array, new: Array, beta: Array, old: Array, unbias: Array, eps: float, adam: Array
) -> None:
    """Adam's moments and direction, rows ``first`` to ``last`` of (rows, n) float32 arrays.

    m = beta m + c u and v = sqrt(beta v + c u u), with c = (1 - beta) + new old; adam = (m / unbias[0]) / (v / unbias[1] + eps).
    new: (rows,) float32; beta, old, unbias: (2,) float32, for the first and the second moment.
    """
    for i in range(first, last):
        mean, root, values, found = m[i], v[i], u[i], adam[i]
        c1, c2 = (ONE - beta[0]) + new[i] * old[0], (ONE - beta[1]) + new[i] * old[1]
        for j in range(values.size):
            mean[j] = beta[0] * mean[j] + c1 * values[j]
            root[j] = np.sqrt(beta[1] * root[j] + c2 * (values[j] * values[j]))
            found[j] = (mean[j] / unbias[0]) / (root[j] / unbias[1] + eps)

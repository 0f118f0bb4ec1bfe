"""The passes of Mango's step over whole matrices, each in one sweep where torch makes several.

``compensate`` and ``apply`` compute the bits of their torch twins; ``squares`` adds and ``moments`` rounds in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mango.native.codecs import ONE, TINY, ZERO
from mango.native.jit import compiled, summing

Array = np.ndarray[Any, np.dtype[Any]]
PART = 4096  # values that are summed together
BAND = 64  # rows whose columns are summed together


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
def squares(first: int, last: int, h: Array, rows: Array, columns: Array) -> None:
    """Sums of the squares of h (rows, cols), bands ``first`` to ``last`` of BAND rows.

    rows: (rows,) float32, along each row, written; columns: (bands, cols) float32, down each column of a band, written. Whoever adds
    the bands gets one result for any number of threads; torch's reduction over columns is ten times slower.
    """
    for band in range(first, last):
        sums = columns[band]
        sums[:] = ZERO
        for i in range(band * BAND, min((band + 1) * BAND, h.shape[0])):
            values = h[i]
            for j in range(values.size):
                sums[j] += values[j] * values[j]
            rows[i] = _sum_of_squares(values)


@compiled
def sums_of_squares(first: int, last: int, x: Array, out: Array) -> None:
    """Of x (n,) float32 in parts of PART values, ``first`` to ``last``; not finite where a value is not, or is above 1e19."""
    for part in range(first, last):
        out[part] = _sum_of_squares(x[part * PART : (part + 1) * PART])


@summing
def _sum_of_squares(values: Array) -> Any:
    total = ZERO
    for j in range(values.size):
        total += values[j] * values[j]
    return total


@compiled
def apply(first: int, last: int, w: Array, h: Array, by_row: Array, by_column: Array, decay: float) -> None:
    """w = decay w + by_row h by_column, rows ``first`` to ``last``; w, h: (rows, cols), by_row: (rows,), by_column: (cols,), float32."""
    for i in range(first, last):
        weights, values, scale = w[i], h[i], by_row[i]
        for j in range(weights.size):
            weights[j] = weights[j] * decay + values[j] * scale * by_column[j]


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

"""The passes of Mango's step over whole matrices, each in one sweep where torch makes several.

``compensate`` and ``apply`` compute the bits of their torch twins; ``column_squares`` adds in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mango.native.codecs import TINY, ZERO
from mango.native.jit import compiled

Array = np.ndarray[Any, np.dtype[Any]]
TILE = 512  # columns whose sums stay in the first cache


@compiled
def compensate(first: int, last: int, codes: Array, scales: Array, block: int, levels: Array, g: Array, sign: float, out: Array) -> None:
    """out = decode(codes) + sign * g, blocks ``first`` to ``last``. g, out: (n,) float32, whole blocks; see ``decode_nibbles``."""
    for b in range(first, last):
        begin, end = b * block, (b + 1) * block
        pairs, values = codes[begin // 2 : end // 2], out[begin:end]
        grads = g[begin:end]
        scale = scales[b] if scales[b] > TINY else ZERO
        for k in range(pairs.size):
            values[2 * k] = levels[pairs[k] >> 4] * scale
            values[2 * k + 1] = levels[pairs[k] & 15] * scale
        for i in range(values.size):
            values[i] += sign * grads[i]


@compiled
def apply(first: int, last: int, w: Array, h: Array, scale: Array, by_row: bool, bits: Array, shift: int, decay: float) -> None:
    """w = decay w + (scale h + q), rows ``first`` to ``last``.

    w, h: (rows, cols) float32; scale: (rows,) or (cols,) float32; bits: q (rows, cols), float32 as uint32 with shift 0, or bfloat16 as
    uint16 with shift 16, which are its upper bits.
    """
    wide = np.empty(w.shape[1], np.uint32)
    q = wide.view(np.float32)
    for i in range(first, last):
        weights, values, row = w[i], h[i], bits[i]
        for j in range(wide.size):
            wide[j] = np.uint32(row[j]) << np.uint32(shift)
        if by_row:
            for j in range(weights.size):
                weights[j] = weights[j] * decay + (values[j] * scale[i] + q[j])
        else:
            for j in range(weights.size):
                weights[j] = weights[j] * decay + (values[j] * scale[j] + q[j])


@compiled
def column_squares(first: int, last: int, h: Array, out: Array) -> None:
    """Squared norms of the columns of h (rows, cols), tiles ``first`` to ``last``, (cols,); torch's reduction is ten times slower."""
    for t in range(first, last):
        sums = np.zeros(min(TILE, h.shape[1] - t * TILE), np.float32)
        for i in range(h.shape[0]):
            values = h[i, t * TILE : t * TILE + sums.size]
            for j in range(sums.size):
                sums[j] += values[j] * values[j]
        out[t * TILE : t * TILE + sums.size] = sums

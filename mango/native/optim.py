"""The passes of Mango's step over whole matrices, each in one sweep where torch makes several. Same bits as the torch twins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from mango.native.codecs import TINY, ZERO
from mango.native.jit import compiled

Array = np.ndarray[Any, np.dtype[Any]]
TILE = 512  # columns whose sums stay in the first cache


def widen(q: Array, buffer: Array) -> Array:
    """q (n,) as float32: itself, or bfloat16 held as uint16, in ``buffer``."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(q: Array, buffer: Array) -> Any:
    if q.dtype == types.uint16:

        def wide(q: Array, buffer: Array) -> Array:
            bits = buffer.view(np.uint32)
            for i in range(q.size):
                bits[i] = np.uint32(q[i]) << np.uint32(16)
            return buffer[: q.size]

        return wide

    def same(q: Array, buffer: Array) -> Array:
        return q

    return same


@compiled
def compensate(first: int, last: int, codes: Array, scales: Array, block: int, levels: Array, g: Array, sign: float, out: Array) -> None:
    """out = decode(codes) + sign * g, blocks ``first`` to ``last``. g, out: (n,) float32, whole blocks; see ``decode_nibbles``."""
    for b in range(first, last):
        pairs, values, grads = (
            codes[b * block // 2 : ((b + 1) * block) // 2],
            out[b * block : (b + 1) * block],
            g[b * block : (b + 1) * block],
        )
        scale = scales[b] if scales[b] > TINY else ZERO
        for k in range(pairs.size):
            values[2 * k] = levels[pairs[k] >> 4] * scale
            values[2 * k + 1] = levels[pairs[k] & 15] * scale
        for i in range(values.size):
            values[i] += sign * grads[i]


@compiled
def apply(first: int, last: int, w: Array, h: Array, scale: Array, by_row: bool, q: Array, decay: float) -> None:
    """w = decay w + (scale h + q), rows ``first`` to ``last``. w, h: (rows, cols) float32; scale: (rows,) or (cols,); q as above."""
    buffer = np.empty(w.shape[1], np.float32)
    for i in range(first, last):
        weights, values, taken = w[i], h[i], widen(q[i], buffer)
        if by_row:
            for j in range(weights.size):
                weights[j] = weights[j] * decay + (values[j] * scale[i] + taken[j])
        else:
            for j in range(weights.size):
                weights[j] = weights[j] * decay + (values[j] * scale[j] + taken[j])


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

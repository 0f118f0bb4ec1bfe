"""Block-absmax quantisers as loops over blocks. Arithmetic is float32, operation by operation that of the torch twins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

Array = np.ndarray[Any, np.dtype[Any]]
ONE, HALF, TINY = np.float32(1.0), np.float32(0.5), np.float32(1e-38)


@njit(parallel=True, cache=True)
def absmax(bits: Array, block: int, peaks: Array) -> None:
    """The largest magnitude of each block: float32 seen as int32, whose order is that of the magnitudes, with NaN above all.

    bits: (n,) int32; peaks: (blocks,) int32, written.
    """
    for b in prange(peaks.size):
        peak = np.int32(0)
        for i in range(b * block, min((b + 1) * block, bits.size)):
            peak = max(peak, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
        peaks[b] = peak


@njit(parallel=True, cache=True)
def encode_bytes(x: Array, scales: Array, block: int, table: Array, codes: Array) -> None:
    """Codes from a table over [-1, 1]. x: (n,) float32; scales: (blocks,) float32; table: (65536,) uint8; codes: (n,) uint8, written."""
    for b in prange(scales.size):
        lo, hi = b * block, min((b + 1) * block, x.size)
        inverse = ONE / scales[b]
        entry = np.empty(block, np.int32)  # apart from the look-up, which has no vector instruction
        for i in range(lo, hi):
            v = x[i] * inverse
            v = v if v == v else -ONE
            v = min(max(v, -ONE), ONE) + ONE
            # the product is exact in float64 and rounded once, as in a fused multiply-add
            entry[i - lo] = np.int32(np.float32(v * 32767.5 + 0.5))
        for i in range(lo, hi):
            codes[i] = table[entry[i - lo]]


@njit(parallel=True, cache=True)
def decode_bytes(codes: Array, scales: Array, block: int, levels: Array, out: Array) -> None:
    """out (n,) float32 = level * scale, 0 where the scale is not above 1e-38. levels: (256,) float32."""
    for b in prange(scales.size):
        scale = scales[b] if scales[b] > TINY else np.float32(0.0)
        for i in range(b * block, min((b + 1) * block, out.size)):
            out[i] = levels[codes[i]] * scale


@njit(parallel=True, cache=True)
def encode_nibbles(x: Array, scales: Array, block: int, thresholds: Array, order: Array, codes: Array) -> None:
    """Codes of the nearest of 16 levels, two to a byte; equality goes to the lower level.

    x: (n,) float32; scales: (blocks,) float32, at least 1e-38 where the last block is short; thresholds: (15,) float32, sorted;
    order: (16,) uint8, the code of each interval between them; codes: (ceil(n / 2),) uint8, written.
    """
    for b in prange(scales.size):
        lo, hi = b * block, min((b + 1) * block, x.size)
        scale = max(scales[b], TINY)
        inverse = ONE / scale
        found = np.empty(block, np.uint8)
        for i in range(lo, hi):
            v = x[i] * inverse if hi - lo == block else x[i] / scale
            above = np.int32(0)
            for t in range(15):
                above += np.int32(v > thresholds[t])
            found[i - lo] = above
        if (hi - lo) % 2:  # the value that fills the last byte is 0
            above = np.int32(0)
            for t in range(15):
                above += np.int32(np.float32(0.0) > thresholds[t])
            found[hi - lo] = above
        for k in range((hi - lo + 1) // 2):
            codes[lo // 2 + k] = (order[found[2 * k]] << 4) | order[found[2 * k + 1]]


@njit(parallel=True, cache=True)
def decode_nibbles(codes: Array, scales: Array, block: int, levels: Array, out: Array) -> None:
    """out (n,) float32 = level * scale, 0 where the scale is not above 1e-38. levels: (16,) float32 by code."""
    for b in prange(scales.size):
        lo, hi = b * block, min((b + 1) * block, out.size)
        scale = scales[b] if scales[b] > TINY else np.float32(0.0)
        for k in range((hi - lo) // 2):
            pair = codes[lo // 2 + k]
            out[lo + 2 * k] = levels[pair >> 4] * scale
            out[lo + 2 * k + 1] = levels[pair & 15] * scale
        if (hi - lo) % 2:
            out[hi - 1] = levels[codes[hi // 2] >> 4] * scale

"""Block-absmax quantisers as loops over the blocks from ``first`` to ``last``.

Arithmetic is float32, operation by operation that of the torch twins. Each block, or piece of TILE values of a longer one (both are powers
of two), is a slice, which spares the checks of every index and lets the compiler use vector instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mango.native.jit import PAIRS, TILE, compiled, multiply_add, scratch
from mango.native.registers import BINS, CHUNK, HALF_BINS, MIDDLE_BIN, PERMUTES, WIDTH, largest_of_chunk, look_up_codes, look_up_levels

Array = np.ndarray[Any, np.dtype[Any]]
ZERO, ONE, TINY, INFINITE = np.float32(0.0), np.float32(1.0), np.float32(1e-38), np.float32(np.inf)
NONE, UNIT, TWO, FOUR, EIGHT = (np.int32(bit) for bit in (0, 1, 2, 4, 8))
MAGNITUDE, SIGN = np.int32(0x7FFFFFFF), np.int32(31)
ROUND, HALF = np.int32(0x7FFF), np.int32(16)
PAIR = np.float32(2.0)
ENTRIES, SHARE = np.float32(32767.5), np.float32(0.5)  # of the table of mango.codecs.int8: entry of v, from 0 to 2, rounded down
DRAW, MIDDLE = np.float32(2.0**-16), np.float32(32768.5 * 2.0**-16)  # of mango.codecs.bits.add_uniform


@compiled
def absmax(first: int, last: int, bits: Array, block: int, peaks: Array) -> None:
    """The largest magnitude of each block: float32 seen as int32, whose order is that of the magnitudes, with NaN above all.

    bits: (n,) int32; peaks: (blocks,) int32, written.
    """
    for b in range(first, last):
        peaks[b] = largest(bits, b * block, min((b + 1) * block, bits.size))


@compiled
def largest(bits: Array, begin: int, end: int) -> Any:
    """The largest magnitude of one block, as of ``absmax``."""
    peak, whole = NONE, (end - begin) // CHUNK if PERMUTES else 0
    for k in range(whole):
        peak = max(peak, largest_of_chunk(bits, begin + CHUNK * k))
    if begin + CHUNK * whole < end:
        rest = bits[begin + CHUNK * whole : end]
        for i in range(rest.size):
            peak = max(peak, np.int32(rest[i] & MAGNITUDE))
    return peak


@compiled
def encode_bytes(first: int, last: int, x: Array, scales: Array, block: int, table: Array, codes: Array) -> None:
    """Codes from a table over [-1, 1]. x: (n,) float32; scales: (blocks,) float32; table: (65536,) uint8; codes: (n,) uint8, written."""
    entry = scratch(TILE, np.int32)
    piece = min(block, TILE)
    for begin in range(first * block, last * block, piece):
        end, b = begin + piece, begin // block
        look_up(x[begin:end], scales[b], table, entry, codes[begin:end])


@compiled
def look_up(values: Array, scale: float, table: Array, entry: Array, found: Array) -> None:
    """The codes of ``encode_bytes`` for (part of) a block. entry: int32, for scratch, apart from the look-up, which has no vector
    instruction."""
    inverse = ONE / scale
    for i in range(values.size):
        v = values[i] * inverse
        v = v if v == v else -ONE
        v = min(max(v, -ONE), ONE) + ONE
        entry[i] = np.int32(multiply_add(v, ENTRIES, SHARE))
    for i in range(values.size):
        found[i] = table[np.uint32(entry[i])]


@compiled
def decode_bytes(first: int, last: int, codes: Array, scales: Array, block: int, levels: Array, out: Array) -> None:
    """out (n,) = level * scale, 0 where the scale is not above 1e-38. levels: (256,) float32; out: see ``store``."""
    bits = scratch(TILE, np.int32)
    values = bits.view(np.float32)
    piece = min(block, TILE)
    for begin in range(first * block, last * block, piece):
        end, b = begin + piece, begin // block
        scale = scales[b] if scales[b] > TINY else ZERO
        found = codes[begin:end]
        for i in range(found.size):
            values[i] = levels[found[i]] * scale
        store(bits, out[begin:end])


@compiled
def store(wide: Array, out: Array) -> None:
    """The bits of finite float32, int32, as they are, or, where out is int16, of the nearest bfloat16, ties to even."""
    if out.itemsize == 2:
        for j in range(out.size):
            out[j] = np.int16(np.int32(wide[j] + np.int32(ROUND + ((wide[j] >> HALF) & UNIT))) >> HALF)
    else:
        for j in range(out.size):
            out[j] = wide[j]


@compiled
def encode_nibbles(first: int, last: int, x: Array, scales: Array, block: int, thresholds: Array, order: Array, codes: Array) -> None:
    """Codes of the nearest of 16 levels, two to a byte; equality goes to the lower level.

    x: (n,) float32; scales: (blocks,) float32, at least 1e-38 where the last block is short; thresholds: (15,) float32, sorted;
    order: (16,) uint8, the code of each interval between them; codes: (ceil(n / 2),) uint8, written.
    """
    unit, found, inverse = scratch(TILE, np.float32), scratch(TILE, np.uint8), scratch(WIDTH, np.float32)
    edges, lower, upper = scratch(BINS, np.float32), scratch(BINS, np.int32), scratch(BINS, np.int32)
    edges = edges[: tabulate(thresholds, order, edges, lower, upper)]
    piece = min(block, TILE)
    for begin in range(first * block, last * block, piece):
        end, b = begin + piece, begin // block
        scale, values, into = max(scales[b], TINY), x[begin:end], codes[begin // 2 : end // 2]
        if (b + 1) * block <= x.size:
            inverse[0] = ONE / scale
            nearest(values, inverse[:1], thresholds, order, edges, lower, upper, unit, found, into)
        else:
            for i in range(values.size):
                unit[i] = values[i] / scale
            unit[values.size : piece] = ZERO  # the value that fills the last byte
            _search(unit[:piece], thresholds, order, found, into)


@compiled
def tabulate(thresholds: Array, order: Array, edges: Array, lower: Array, upper: Array) -> Any:
    """Fills the tables of ``look_up_codes``. Returns how many bins they have: none where they are of no use, as there are no thresholds, or
    two share a bin (FP4's do), or the processor cannot permute."""
    if not (PERMUTES and thresholds.size):
        return 0
    passed = 0
    for b in range(edges.size):
        begun = passed
        edges[b], lower[b] = INFINITE, order[passed]
        while passed < thresholds.size and np.int32(thresholds[passed] * HALF_BINS + MIDDLE_BIN) == b:
            edges[b] = thresholds[passed]
            passed += 1
        upper[b] = order[passed]
        if passed > begun + 1:
            return 0
    return edges.size


@compiled
def nearest(
    values: Array,
    inverse: Array,
    thresholds: Array,
    order: Array,
    edges: Array,
    lower: Array,
    upper: Array,
    unit: Array,
    found: Array,
    pairs: Array,
) -> None:
    """The codes of ``encode_nibbles`` of whole blocks.

    values: (n,) float32; inverse: (blocks,) float32, what those of a block are multiplied by; edges, lower, upper: as ``tabulate`` left
    them; unit: float32, found: uint8, for as many values, for scratch; pairs: (n / 2,) uint8, written.
    """
    block = values.size // inverse.size
    if edges.size and block % (2 * WIDTH) == 0:
        for b in range(inverse.size):
            for begin in range(b * block, (b + 1) * block, 2 * WIDTH):
                look_up_codes(values, begin, inverse[b], edges, lower, upper, pairs, begin // 2)
        return
    for b in range(inverse.size):
        whole, parts, factor = values[b * block : (b + 1) * block], unit[b * block : (b + 1) * block], inverse[b]
        for j in range(parts.size):
            parts[j] = whole[j] * factor
    _search(unit[: values.size], thresholds, order, found, pairs)


@compiled
def _search(unit: Array, thresholds: Array, order: Array, found: Array, pairs: Array) -> None:
    """``nearest`` where there are no tables: codes of unit (n,) float32; pairs: (n / 2,) uint8 or less, written."""
    halves = found.view(np.uint16)  # the two codes of a byte
    t0, t1, t2, t3, t4, t5, t6, t7 = thresholds[:8]
    t8, t9, t10, t11, t12, t13, t14 = thresholds[8:]
    for i in range(unit.size):  # binary search in four rounds of selections, which vectorise where branches would not
        v = unit[i]
        c8 = v > t7
        c4 = v > (t11 if c8 else t3)
        low, high = t5 if c4 else t1, t13 if c4 else t9
        c2 = v > (high if c8 else low)
        e0, e4, e8, e12 = t2 if c2 else t0, t6 if c2 else t4, t10 if c2 else t8, t14 if c2 else t12
        low, high = e4 if c4 else e0, e12 if c4 else e8
        c1 = v > (high if c8 else low)
        code = (EIGHT if c8 else NONE) | (FOUR if c4 else NONE)
        found[i] = np.uint8(code | (TWO if c2 else NONE) | (UNIT if c1 else NONE))
    for place in range(16):
        if order[place] != place:
            for i in range(unit.size):
                found[i] = order[found[i]]
            break
    for k in range(pairs.size):
        pairs[k] = np.uint8(np.uint16(halves[k] << np.uint16(4)) | np.uint16(halves[k] >> np.uint16(8)))


@compiled
def decode_nibbles(first: int, last: int, codes: Array, scales: Array, block: int, pairs: Array, out: Array) -> None:
    """out (n,) = level * scale, 0 where the scale is not above 1e-38.

    pairs: (256,) float64, whose 8 bytes are two levels; out: see ``store``.
    """
    wide, bits, levels = scratch(PAIRS, np.float64), scratch(TILE, np.int32), scratch(WIDTH, np.float32)
    level, values = wide.view(np.float32), bits.view(np.float32)
    single(pairs, levels)
    piece = min(block, TILE)
    for begin in range(first * block, last * block, piece):
        end, b = begin + piece, begin // block
        scale = scales[b] if scales[b] > TINY else ZERO
        into = out[begin:end]
        expand(codes[begin // 2 : end // 2], pairs, levels, wide)
        for i in range(into.size):
            values[i] = level[i] * scale
        store(bits, into)


@compiled
def single(pairs: Array, levels: Array) -> None:
    """The levels of the sixteen codes, float32, of which ``pairs`` has two to an entry."""
    both = pairs.view(np.float32)
    for code in range(levels.size):
        levels[code] = both[2 * code + 1]


@compiled
def expand(codes: Array, pairs: Array, levels: Array, wide: Array) -> None:
    """wide (n,) float64 = the pairs of levels of codes (n,) uint8, apart from what is done with them: a look-up in all pairs, unlike one in
    sixteen levels, has no vector instruction."""
    level = wide.view(np.float32)
    whole = codes.size // WIDTH if PERMUTES else 0
    for k in range(whole):
        look_up_levels(codes, WIDTH * k, levels, level, 2 * WIDTH * k)
    for k in range(WIDTH * whole, codes.size):
        wide[k] = pairs[codes[k]]


@compiled
def extremes(first: int, last: int, bits: Array, block: int, low: Array, high: Array) -> None:
    """The least and the largest value of each block: float32 seen as int32, in the order of the values, with NaN beyond both ends.

    bits: (n,) int32; low, high: (blocks,) int32, written.
    """
    for b in range(first, last):
        values = bits[b * block : (b + 1) * block]
        least, most = MAGNITUDE, np.int32(-1) - MAGNITUDE
        for i in range(values.size):
            ordered = np.int32(values[i] ^ ((values[i] >> SIGN) & MAGNITUDE))  # magnitudes of negative values turned round
            least, most = min(least, ordered), max(most, ordered)
        low[b] = least ^ ((least >> SIGN) & MAGNITUDE)
        high[b] = most ^ ((most >> SIGN) & MAGNITUDE)


@compiled
def encode_affine(
    first: int, last: int, x: Array, zeros: Array, steps: Array, block: int, top: float, draws: Array, bits: int, codes: Array
) -> None:
    """Codes floor((x - zero) / step + u), u = (draw + 32768.5) / 65536, within 0 and ``top``, 8 / bits of them to a byte.

    x: (n,) float32; zeros, steps: (blocks,) float32; draws: (n,) int16; codes: (ceil(n bits / 8),) uint8, written.
    """
    found = scratch(TILE, np.int32)
    piece = min(block, TILE)
    for begin in range(first * block, last * block, piece):
        end, b = begin + piece, begin // block
        zero, step = zeros[b], steps[b]
        values, words = x[begin:end], draws[begin:end]
        for i in range(values.size):
            v = (values[i] - zero) / step + np.float32(words[i]) * DRAW + MIDDLE
            found[i] = np.int32(min(max(v, ZERO), top))
        found[values.size : piece] = NONE
        _pack(found, bits, codes[begin * bits // 8 : end * bits // 8])


@compiled
def encode_pair(first: int, last: int, r: Array, steps: Array, block: int, top: float, draws: Array, codes: Array) -> None:
    """Sums of two roundings of r / step (see mango.mole.pair), within 0 and ``top``, two to a byte; arrays as of ``encode_affine``."""
    found = scratch(TILE, np.int32)
    piece = min(block, TILE)
    for begin in range(first * block, last * block, piece):
        end, b = begin + piece, begin // block
        step = steps[b]
        values, words = r[begin:end], draws[begin:end]
        for i in range(values.size):
            v = values[i] / step
            lower = np.floor(v)
            f = v - lower
            u = np.float32(words[i]) * DRAW + MIDDLE
            s = lower * PAIR + (ONE if u < f * f else ZERO) + (ONE if u < f * (PAIR - f) else ZERO)
            found[i] = np.int32(min(max(s, ZERO), top))
        found[values.size : piece] = NONE
        _pack(found, 4, codes[begin // 2 : end // 2])


@compiled
def _pack(found: Array, bits: int, codes: Array) -> None:
    """The first code in the uppermost bits. found: (n,) int32."""
    if bits == 4:
        for k in range(codes.size):
            codes[k] = np.uint8((found[2 * k] << 4) | found[2 * k + 1])
    else:
        for k in range(codes.size):
            codes[k] = np.uint8((found[4 * k] << 6) | (found[4 * k + 1] << 4) | (found[4 * k + 2] << 2) | found[4 * k + 3])


@compiled
def decode_affine(
    first: int, last: int, codes: Array, zeros: Array, scales: Array, block: int, bits: int, pairs: Array, out: Array
) -> None:
    """out (n,) float32 = level * scale + zero.

    zeros, scales: (blocks,) float32; pairs: float64 whose 8 bytes are two levels, (256,) for four bits and (16,) for two.
    """
    wide = scratch(PAIRS, np.float64)  # apart from the product, as a look-up has no vector instruction
    level = wide.view(np.float32)
    piece = min(block, TILE)
    for begin in range(first * block, last * block, piece):
        end, b = begin + piece, begin // block
        scale, zero = scales[b], zeros[b]
        found, values = codes[begin * bits // 8 : end * bits // 8], out[begin:end]
        if bits == 4:
            for k in range(found.size):
                wide[k] = pairs[found[k]]
        else:
            for k in range(found.size):
                wide[2 * k] = pairs[found[k] >> 4]
                wide[2 * k + 1] = pairs[found[k] & 15]
        for i in range(values.size):
            values[i] = level[i] * scale + zero

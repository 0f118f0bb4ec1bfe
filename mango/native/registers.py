"""What AVX-512 does in a register and the compiler finds in no loop: look-ups in tables of 16 or 32 entries, masks of signs, largest
magnitudes.

Intrinsics for the bodies of compiled loops, behind ``PERMUTES``: where it is False they do nothing. Arrays are contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

# of the processor that numba compiles for: this one, unless its settings name another or leave features out
_NUMBA: Any = config
PERMUTES = bool(
    _NUMBA.CPU_NAME is None and _NUMBA.CPU_FEATURES is None and _NUMBA.ENABLE_AVX and binding.get_host_cpu_features().get("avx512f")
)
WIDTH = 16  # values of 32 bits in a register
CHUNK = 4 * WIDTH
BINS = 2 * WIDTH  # of [-1, 1]: entries of a table in two registers
HALF_BINS, MIDDLE_BIN = np.float32(14.0), np.float32(16.0)  # bin of v: HALF_BINS v + MIDDLE_BIN, rounded down; within for |v| up to 8/7
BYTE, HALF_WORD, WORD, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def _many(kind: Any, *values: float) -> Any:
    return ir.Constant(ir.VectorType(kind, len(values)), list(values))


def _one(kind: Any, value: float) -> Any:
    return _many(kind, *[value] * WIDTH)


def _address(context: Any, builder: Any, array: Any, kind: Any, place: Any, vector: Any) -> Any:
    place = ir.Constant(WORD, place) if isinstance(place, int) else place
    return builder.bitcast(builder.gep(make_array(kind)(context, builder, array).data, [place]), vector.as_pointer())


def _load(context: Any, builder: Any, array: Any, kind: Any, place: Any, item: Any, count: int = WIDTH) -> Any:
    value = builder.load(_address(context, builder, array, kind, place, ir.VectorType(item, count)))
    value.align = 1
    return value


def _store(context: Any, builder: Any, value: Any, array: Any, kind: Any, place: Any) -> None:
    builder.store(value, _address(context, builder, array, kind, place, value.type)).align = 1


def _permute(builder: Any, index: Any, *table: Any) -> Any:
    """table[index], for a table in one register or in two."""
    floats = table[0].type.element == FLOAT
    name = f"permvar.{'sf' if floats else 'si'}" if len(table) == 1 else f"vpermi2var.{'ps' if floats else 'd'}"
    arguments = [table[0], index, *table[1:]]
    signature = ir.FunctionType(table[0].type, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.avx512.{name}.512"), arguments)


def _levels(typing_context: Any, codes: Any, place: Any, levels: Any, out: Any, to: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if PERMUTES:
            (codes, place, levels, out, to), kinds = arguments, signature.args
            pairs = builder.zext(_load(context, builder, codes, kinds[0], place, BYTE), ir.VectorType(WORD, WIDTH))
            table = _load(context, builder, levels, kinds[2], 0, FLOAT)
            upper = _permute(builder, builder.lshr(pairs, _one(WORD, 4)), table)
            lower = _permute(builder, builder.and_(pairs, _one(WORD, 15)), table)
            order = _many(WORD, *(at for k in range(WIDTH) for at in (k, WIDTH + k)))
            _store(context, builder, builder.shuffle_vector(upper, lower, order), out, kinds[3], to)
        return context.get_dummy_value()

    return types.void(codes, types.intp, levels, out, types.intp), generate


look_up_levels: Any = intrinsic(_levels)
"""look_up_levels(codes, place, levels, out, to) in a loop: the 32 levels of 16 bytes from codes[place] on are written from out[to] on.

codes: uint8, the first of two in the upper half; levels: (16,) float32, by code; out: float32."""


def _codes(typing_context: Any, values: Any, place: Any, factor: Any, edges: Any, lower: Any, upper: Any, out: Any, to: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if PERMUTES:
            (values, place, factor, edges, lower, upper, out, to), kinds = arguments, signature.args
            tables = [
                [_load(context, builder, array, kind, half, item) for half in (0, WIDTH)]
                for array, kind, item in zip((edges, lower, upper), kinds[3:6], (FLOAT, WORD, WORD), strict=True)
            ]
            both = _load(context, builder, values, kinds[0], place, FLOAT, 2 * WIDTH)
            one = builder.insert_element(ir.Constant(both.type, ir.Undefined), factor, WORD(0))
            both = builder.fmul(both, builder.shuffle_vector(one, one, _many(WORD, *[0] * 2 * WIDTH)))
            codes = []
            for first in (0, 1):
                v = builder.shuffle_vector(both, both, _many(WORD, *range(first, 2 * WIDTH, 2)))
                scaled = builder.fadd(builder.fmul(v, _one(FLOAT, float(HALF_BINS))), _one(FLOAT, float(MIDDLE_BIN)))
                at = builder.fptosi(scaled, ir.VectorType(WORD, WIDTH))
                edge, below, above = (_permute(builder, at, *table) for table in tables)
                codes.append(builder.select(builder.fcmp_ordered(">", v, edge), above, below))
            pairs = builder.or_(builder.shl(codes[0], _one(WORD, 4)), codes[1])
            _store(context, builder, builder.trunc(pairs, ir.VectorType(BYTE, WIDTH)), out, kinds[6], to)
        return context.get_dummy_value()

    return types.void(values, types.intp, types.float32, edges, lower, upper, out, types.intp), generate


look_up_codes: Any = intrinsic(_codes)
"""look_up_codes(values, place, factor, edges, lower, upper, out, to) in a loop: 32 values from values[place] on, times the factor, as
codes, two to a byte, in 16 from out[to] on.

values: float32, in [-1, 1] with the factor; edges: (BINS,) float32, lower, upper: (BINS,) int32: the codes of a bin's values up to its
edge, and beyond."""


def _largest(typing_context: Any, bits: Any, place: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not PERMUTES:
            return WORD(0)
        (bits, place), kinds = arguments, signature.args
        peak = _one(WORD, 0)
        for begin in range(0, CHUNK, WIDTH):
            found = _load(context, builder, bits, kinds[0], builder.add(place, place.type(begin)), WORD)
            found = builder.and_(found, _one(WORD, 0x7FFFFFFF))
            peak = builder.select(builder.icmp_signed(">", found, peak), found, peak)
        reduce = ir.FunctionType(WORD, [peak.type])
        return builder.call(cgutils.get_or_insert_function(builder.module, reduce, f"llvm.vector.reduce.smax.v{WIDTH}i32"), [peak])

    return types.int32(bits, types.intp), generate


largest_of_chunk: Any = intrinsic(_largest)
"""largest_of_chunk(bits, place) in a loop: the largest magnitude of CHUNK values from bits[place] on, float32 as int32."""


def _signs(typing_context: Any, values: Any, place: Any, signs: Any, to: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if PERMUTES:
            (values, place, signs, to), kinds = arguments, signature.args
            sixteen = _load(context, builder, values, kinds[0], place, FLOAT)
            for half, order in enumerate(("<", ">")):
                bits = builder.bitcast(builder.fcmp_ordered(order, sixteen, _one(FLOAT, 0.0)), ir.VectorType(HALF_WORD, 1))
                _store(context, builder, bits, signs, kinds[2], builder.add(to, to.type(half)))
        return context.get_dummy_value()

    return types.void(values, types.intp, signs, types.intp), generate


pack_signs: Any = intrinsic(_signs)
"""pack_signs(values, place, signs, to) in a loop: which of the 16 values from values[place] on are below zero is written to signs[to], a
bit for each, and which are above to signs[to + 1]. values: float32; signs: int16."""


def _unpacked(typing_context: Any, signs: Any, place: Any, out: Any, to: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if PERMUTES:
            (signs, place, out, to), kinds = arguments, signature.args
            found = _one(FLOAT, 0.0)
            for half, value in enumerate((-1.0, 1.0)):
                bits = _load(context, builder, signs, kinds[0], builder.add(place, place.type(half)), HALF_WORD, 1)
                found = builder.select(builder.bitcast(bits, ir.VectorType(ir.IntType(1), WIDTH)), _one(FLOAT, value), found)
            _store(context, builder, found, out, kinds[2], to)
        return context.get_dummy_value()

    return types.void(signs, types.intp, out, types.intp), generate


unpack_signs: Any = intrinsic(_unpacked)
"""unpack_signs(signs, place, out, to) in a loop: -1, 0 or 1 for each of 16 values of ``pack_signs``, from out[to] on, float32."""

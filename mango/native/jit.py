"""How the loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

TILE = 512  # values that are worked on together: a few arrays of them fit the fastest cache
PAIRS = TILE // 2
# numba looks for changes in the file of a loop alone, and these call one another: what is kept on disk is named after all of them
SOURCES = sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[:8]


def compiled(loop: Callable[..., Any], fastmath: bool | set[str] = False) -> Any:
    """Machine code without Python's lock, with the division of IEEE 754, kept on disk where numba finds a folder that it may write.

    And without numba's counts of references: a slice is then an atomic addition and later a subtraction, unless the compiler finds them
    needless, and in the pass that finds an error they took as long as all the arithmetic. So a loop allocates nothing but ``scratch``, and
    returns no array.
    """
    options: Any = {"nogil": True, "error_model": "numpy", "fastmath": fastmath, "_nrt": False}
    loop.__qualname__ = f"{loop.__qualname__}_{SOURCES}"
    try:
        return njit(cache=True, **options)(loop)
    except RuntimeError:  # a read-only installation and no home: compiled anew in each process
        return njit(**options)(loop)


def summing(loop: Callable[..., Any]) -> Any:
    """``compiled`` for a sum whose order the compiler may choose: it takes several terms at a time."""
    return compiled(loop, {"reassoc"})


def _on_stack(typing_context: Any, count: Any, dtype: Any) -> Any:
    array = types.Array(dtype.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = context.get_data_type(array.dtype)
        values = cgutils.alloca_once(builder, ir.ArrayType(item, count.literal_value))
        values.align = 64
        shape, stride = (context.get_constant(types.intp, number) for number in (count.literal_value, context.get_abi_sizeof(item)))
        header = make_array(array)(context, builder)
        populate_array(
            header,
            data=builder.bitcast(values, item.as_pointer()),
            shape=cgutils.pack_array(builder, [shape]),
            strides=cgutils.pack_array(builder, [stride]),
            itemsize=stride,
            meminfo=None,  # nothing to count
        )
        return header._getvalue()

    return array(count, dtype), generate


scratch: Any = intrinsic(prefer_literal=True)(_on_stack)
"""scratch(count, dtype) in a loop: an array (count,) on the stack, whose content is left over. The count is a constant, of which a loop's
name is one and an expression is not."""


def _of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


as_float: Any = intrinsic(_of_bits)
"""as_float(bits) in a loop: the float32 of these bits, int32."""


def _fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


multiply_add: Any = intrinsic(_fused)
"""multiply_add(a, b, c) in a loop: a b + c, float32, rounded once."""

"""A compiled loop on an OpenMP team, without Python: each thread of the team runs its part of the range as machine code.

A thread that had to come through Python would wait for Python's lock, asleep, for as long as many a loop takes.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from torch import Tensor

WORD = ir.IntType(64)
ARRAYS = {
    torch.float32: types.float32,
    torch.float64: types.float64,
    torch.uint8: types.uint8,
    torch.int8: types.int8,
    torch.int16: types.int16,
    torch.int32: types.int32,
}
_entries: dict[tuple[Any, ...], tuple[int, struct.Struct, Any]] = {}


def run(library: ctypes.CDLL, loop: Any, count: int, threads: int, arguments: tuple[Tensor | int | float, ...]) -> None:
    """``loop(first, last, *arguments)`` over 0..count by this many threads of GNU's OpenMP ``library``.

    Raises RuntimeError when the loop raised anything; what it was is lost.
    """
    kinds: list[Any] = [loop]
    words: list[int | float] = [count, 0]  # what an entry reads; the second is written when the loop fails
    for argument in arguments:
        if isinstance(argument, Tensor):
            size, shape = argument.element_size(), argument.shape
            kinds.append((argument.dtype, len(shape), argument.is_contiguous()))
            words += (0, 0, argument.numel(), size, argument.data_ptr(), *shape, *[size * stride for stride in argument.stride()])
        else:
            kinds.append(type(argument))
            words.append(argument)
    key = tuple(kinds)
    if key not in _entries:
        _entries[key] = _make(library, loop, [_numba_type(argument) for argument in arguments])
    entry, layout, _ = _entries[key]
    data = bytearray(layout.size)
    layout.pack_into(data, 0, *words)
    held = (ctypes.c_int64 * (layout.size // 8)).from_buffer(data)
    library.GOMP_parallel(entry, ctypes.addressof(held), threads, 0)
    if held[1]:
        raise RuntimeError(f"the compiled loop {loop.__name__} failed (status {held[1]})")


def _numba_type(argument: Tensor | int | float) -> Any:
    """The type that numba gives to the argument, or to ``Tensor.numpy()`` of it; a float counts as float32."""
    if isinstance(argument, Tensor):
        return types.Array(ARRAYS[argument.dtype], argument.ndim, "C" if argument.is_contiguous() else "A")
    return types.float32 if isinstance(argument, float) else types.int64


@global_compiler_lock
def _make(library: ctypes.CDLL, loop: Any, kinds: list[Any]) -> tuple[int, struct.Struct, Any]:
    """The address of ``void entry(int64 *words)``, which calls the loop for the part of the thread it runs on; how words are packed; and
    what must be kept while the address is used."""
    signature = (types.int64, types.int64, *kinds)
    loop.compile(signature)
    made = loop.overloads[signature]
    context = made.target_context
    # numba's own convention: where the result and an exception go, then the arguments, an array as its header's fields one by one
    callee = context.call_conv.get_function_type(made.signature.return_type, made.fndesc.argtypes)
    code = context.codegen().create_library(f"mango.{loop.__name__}")
    module = code.create_ir_module("entry")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [WORD]), "entry")
    builder = ir.IRBuilder(function.append_basic_block())

    def word(number: int, kind: ir.Type = WORD) -> ir.Value:
        return builder.inttoptr(builder.add(function.args[0], WORD(8 * number)), kind.as_pointer())

    def ask(name: str) -> ir.Value:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        answer = builder.call(builder.inttoptr(WORD(address), ir.FunctionType(ir.IntType(32), []).as_pointer()), [])
        return builder.zext(answer, WORD)

    thread, size, count = ask("omp_get_thread_num"), ask("omp_get_num_threads"), builder.load(word(0))
    bounds = [builder.sdiv(builder.mul(count, part), size) for part in (thread, builder.add(thread, WORD(1)))]
    results = [builder.bitcast(builder.alloca(WORD), kind) for kind in callee.args[:2]]
    passed = callee.args[4:]
    loaded = [builder.load(word(number, kind)) for number, kind in enumerate(passed, 2)]
    address = made.library.get_pointer_to_function(made.fndesc.llvm_func_name)
    status = builder.call(builder.inttoptr(WORD(address), callee.as_pointer()), [*results, *bounds, *loaded])
    with builder.if_then(builder.icmp_signed("!=", status, status.type(0))):
        builder.store(builder.sext(status, WORD), word(1))
    builder.ret_void()
    code.add_ir_module(module)
    code.finalize()
    layout = struct.Struct("=qq" + "".join("f4x" if isinstance(kind, ir.FloatType) else "q" for kind in passed))
    return code.get_pointer_to_function("entry"), layout, (code, made)

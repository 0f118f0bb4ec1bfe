"""How a tensor is stored: bit-packed bytes and scales. ``mango.codecs.get("nf4", block=64).encode(x)``."""

from mango.codecs.base import Codec
from mango.packed import Packed
from mango.registry import Registry

REGISTRY = Registry(
    "codec",
    {
        "fp32": "mango.codecs.cast:FP32",
        "bf16": "mango.codecs.cast:BF16",
        "int8": "mango.codecs.int8:Int8",
        "nf4": "mango.codecs.nf4:NF4",
        "fp4": "mango.codecs.fp4:FP4",
        "int4": "mango.codecs.affine:Int4",
        "int2": "mango.codecs.affine:Int2",
    },
)
get = REGISTRY.get

__all__ = ["REGISTRY", "Codec", "Packed", "get"]

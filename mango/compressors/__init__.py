"""Operators on tensors that declare what they guarantee: ``alpha`` (contraction), ``unbiased``, ``omega`` (variance), ``nbytes``."""

from mango.compressors.base import Compressor
from mango.compressors.codec import Codec
from mango.compressors.identity import Identity
from mango.compressors.lowrank import LowRank
from mango.compressors.lrq import LRQ
from mango.compressors.natural import Natural
from mango.compressors.sign import Sign
from mango.compressors.sparse import RandK, TopK
from mango.packed import Packed
from mango.registry import Registry

REGISTRY = Registry(
    "compressor",
    {
        "identity": "mango.compressors.identity:Identity",
        "codec": "mango.compressors.codec:Codec",
        "topk": "mango.compressors.sparse:TopK",
        "randk": "mango.compressors.sparse:RandK",
        "lowrank": "mango.compressors.lowrank:LowRank",
        "lrq": "mango.compressors.lrq:LRQ",
        "sign": "mango.compressors.sign:Sign",
        "natural": "mango.compressors.natural:Natural",
    },
)
get = REGISTRY.get

__all__ = ["LRQ", "REGISTRY", "Codec", "Compressor", "Identity", "LowRank", "Natural", "Packed", "RandK", "Sign", "TopK", "get"]

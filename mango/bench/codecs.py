"""``mango bench codecs``: encode + decode of every codec beside bitsandbytes and beside a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mango import codecs
from mango.bench.timing import paired
from mango.errors import ConfigError, MissingExtra


def run(values: int = 1 << 24, repeats: int = 7, warmup: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Times one encode and one decode of Gaussian float32 values on the CPU, new outputs each time, as a user's call would.

    Args:
        values: how many, at least 1.
        repeats, warmup: rounds, see ``mango.bench.timing.paired``.
        seed: of the values.

    Returns:
        One row per codec: codec, values, threads, seconds (median of encode + decode), bytes_per_value, copy_ratio (to ``Tensor.copy_``)
        and bitsandbytes_ratio (median of paired ratios, below 1 is faster than bitsandbytes; None where it has no such format).

    Raises:
        MissingExtra: bitsandbytes is not installed.
        ConfigError: for numbers that are not legal.
    """
    if values < 1:
        raise ConfigError.of("values", values, "an integer >= 1")
    peers = _bitsandbytes()
    x = torch.randn(values, generator=torch.Generator().manual_seed(seed))
    target = torch.empty_like(x)
    rows = []
    for name in codecs.REGISTRY:
        codec = codecs.get(name)
        candidates: dict[str, Callable[[], object]] = {"mango": _round_trip(codec, x), "copy": lambda: target.copy_(x)}
        if name in peers:
            peer = peers[name]
            candidates["bitsandbytes"] = lambda peer=peer: peer(x)  # type: ignore[misc]
        times = paired(candidates, repeats, warmup)
        rows.append(
            {
                "codec": name,
                "values": values,
                "threads": torch.get_num_threads(),
                "seconds": times.median("mango"),
                "bytes_per_value": codec.nbytes((values,)) / values,
                "copy_ratio": times.ratio("mango", "copy"),
                "bitsandbytes_ratio": times.ratio("mango", "bitsandbytes") if name in peers else None,
            }
        )
    return rows


def _round_trip(codec: codecs.Codec, x: Tensor) -> Callable[[], Tensor]:
    return lambda: codec.decode(codec.encode(x))


def _bitsandbytes() -> dict[str, Callable[[Tensor], Tensor]]:
    """The peer's round trips with the block sizes that are ours by default."""
    try:
        functional = import_module("bitsandbytes.functional")
    except ImportError as absent:
        raise MissingExtra.of("bitsandbytes", "experiments", "mango bench codecs") from absent

    def int8(x: Tensor) -> Tensor:
        codes, state = functional.quantize_blockwise(x, blocksize=256)
        return functional.dequantize_blockwise(codes, state)

    def four_bit(kind: str) -> Callable[[Tensor], Tensor]:
        def round_trip(x: Tensor) -> Tensor:
            codes, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind)
            return functional.dequantize_4bit(codes, state)

        return round_trip

    return {"int8": int8, "nf4": four_bit("nf4"), "fp4": four_bit("fp4")}

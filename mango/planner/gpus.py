"""Memory of the cards that the planner knows."""

from __future__ import annotations

from dataclasses import dataclass

from mango.errors import ConfigError

MIB = 1 << 20
SOURCE = "memory.total as nvidia-smi reports it"
RESERVE = 1280 * MIB
"""Bytes kept free on each card: up to 0.75 GiB that the driver keeps from processes (PyTorch reports 79.25 of an A100's 80 GiB, 31.37 of a
5090's 31.84) and about 0.5 GiB for the CUDA context and its libraries. A display or a second process takes more."""


@dataclass(frozen=True)
class GPU:
    """A card: its title and its bytes, as nvidia-smi reports them."""

    title: str
    nbytes: int


GPUS = {
    "rtx3090": GPU("RTX 3090, 24 GB", 24576 * MIB),
    "rtx4090": GPU("RTX 4090, 24 GB", 24564 * MIB),
    "rtx5090": GPU("RTX 5090, 32 GB", 32607 * MIB),
    "a100-40": GPU("A100, 40 GB", 40960 * MIB),
    "a100-80": GPU("A100, 80 GB", 81920 * MIB),
    "h100": GPU("H100, 80 GB", 81559 * MIB),
    "h200": GPU("H200, 141 GB", 143771 * MIB),
}


def find(name: str) -> GPU:
    """Raises: ConfigError for a card that is not known."""
    if name not in GPUS:
        raise ConfigError.of("gpu", name, "one of " + ", ".join(GPUS))
    return GPUS[name]

"""Benchmarks against peers, in one process, as ratios. ``mango.bench.REGISTRY.load(name)(**options)`` returns one dict a row."""

from mango.registry import Registry

REGISTRY = Registry(
    "bench",
    {
        "codecs": "mango.bench.codecs:run",
        "optimizers": "mango.bench.optimizers:run",
        "training": "mango.bench.training:run",
    },
)

__all__ = ["REGISTRY"]

"""``mango bench optimizers``: step time and state bytes beside peers', on twelve matrices or a small GPT, and random gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from mango import optim
from mango.bench.timing import paired
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.models.gpt import GPT

SHAPES = ((1024, 1024),) * 4 + ((4096, 1024),) * 4 + ((1024, 4096),) * 4  # 37.7 million values: four blocks of width 1024
BASE = "adamw"  # the ratio's denominator
ENDS = ("embedding", "head")  # left to AdamW, as Muon's and GaLore's authors do

Row = dict[str, str | float | int]


def candidates(rank: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Row -> (optimizer of the registry, options)."""
    quarter = max(1, rank // 4)
    return {
        "adamw": ("adamw", {}),
        f"mango rank {rank}": ("mango", {"plan": {"rank": rank}}),
        f"mango rank {rank}, no error": ("mango", {"plan": {"rank": rank, "error": "none"}}),
        f"mango rank {quarter}": ("mango", {"plan": {"rank": quarter}}),
        f"mango rank {quarter}, no error": ("mango", {"plan": {"rank": quarter, "error": "none"}}),
        "adafactor": ("adafactor", {}),
        "adamw8bit": ("adamw8bit", {}),
        f"galore rank {rank}": ("galore", {"rank": rank, "update_proj_gap": 200}),
        f"galore8bit rank {rank}": ("galore8bit", {"rank": rank, "update_proj_gap": 200}),
        "muon": ("muon", {}),
    }


def matrices() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the twelve matrices."""
    return {f"matrix {index}": shape for index, shape in enumerate(SHAPES)}


def nanochat() -> dict[str, tuple[int, ...]]:
    """Of a nanochat of six layers: 61 million values, of which 10.6 million in the blocks and the rest in embedding and head."""
    with torch.device("meta"):
        return {name: tuple(param.shape) for name, param in GPT(65536, depth=6, width=384, heads=3).named_parameters()}


MODELS = {"matrices": matrices, "nanochat": nanochat}


def run(
    rank: int = 128,
    repeats: int = 5,
    model: str | Mapping[str, tuple[int, ...]] = "matrices",
    names: Sequence[str] | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """One row for each optimizer: the candidates take turns on weights and gradients of their own memory.

    How long it takes to make each is timed by itself, and so is its first step, where GaLore computes its SVDs and most others allocate.

    Args:
        rank: for the methods that have one; Mango is also run at a quarter of it.
        repeats: steps that are timed.
        model: "matrices", "nanochat", or shapes by name. Parameters called embedding or head are left to AdamW by every method.
        names: rows to run, of ``candidates``; None = all. "adamw" is always run.
        device: where.
        progress: told the name of what is being prepared.

    Returns:
        Rows with name, ratio (median of paired step times over fused AdamW's), median_ms, worst_ms, made_ms, first_ms, bytes_per_parameter.

    Raises:
        ConfigError: for an unknown row or model, or a rank that does not fit the shapes.
    """
    known = candidates(rank)
    for name in names or ():
        if name not in known:
            raise ConfigError.of("names", name, "one of " + ", ".join(known))
    chosen = {name: known[name] for name in known if names is None or name in names or name == BASE}
    if isinstance(model, str) and model not in MODELS:
        raise ConfigError.of("model", model, "one of " + ", ".join(MODELS))
    shapes = MODELS[model]() if isinstance(model, str) else model
    gradients = {name: gaussian(shape, (index,), device) for index, (name, shape) in enumerate(shapes.items())}
    values = sum(gradient.numel() for gradient in gradients.values())
    steps: dict[str, Callable[[], object]] = {}
    made: dict[str, float] = {}
    first: dict[str, float] = {}
    exclude = [end for end in ENDS if any(end in name for name in gradients)]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, (method, options) in chosen.items():
        if progress is not None:
            progress(name)
        named = _weights(gradients)
        start = perf_counter()
        optimizers[name] = optim.build(method, named, lr=1e-3, exclude=exclude, **options)
        made[name] = perf_counter() - start
        steps[name] = optimizers[name].step
        first[name] = paired({name: steps[name]}, repeats=1, warmup=0).worst(name)
    if progress is not None:
        progress("timing")
    times = paired(steps, repeats=repeats, warmup=1)
    return [
        {
            "name": name,
            "ratio": times.ratio(name, BASE),
            "median_ms": 1e3 * times.median(name),
            "worst_ms": 1e3 * times.worst(name),
            "made_ms": 1e3 * made[name],
            "first_ms": 1e3 * first[name],
            "bytes_per_parameter": optim.state_nbytes(optimizers[name]) / values,
        }
        for name in chosen
    ]


def _weights(gradients: Mapping[str, Tensor]) -> list[tuple[str, nn.Parameter]]:
    """Parameters with these gradients, and values in memory of their own that has been written before, as a model's has."""
    named = [(name, nn.Parameter(gradient.clone())) for name, gradient in gradients.items()]
    for name, param in named:
        param.grad = gradients[name]
    return named

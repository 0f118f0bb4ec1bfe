"""``mango bench mole``: forward and backward time and saved bytes of converted blocks beside dense ones, in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mango.bench.timing import paired
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.models.gpt import Block, positions
from mango.mole import MoleConfig, convert
from mango.telemetry import MemoryLedger

BASE, CHECKPOINTED = "dense", "activation checkpointing"
CANDIDATES: dict[str, dict[str, Any] | None] = {
    BASE: None,
    CHECKPOINTED: None,
    "int8": {"store": "int8"},
    "nf4": {"store": "nf4"},
    "int4": {"store": "int4"},
    "int4, recompute": {"store": "int4", "hidden": "recompute"},
    "int2": {"store": "int2"},
    "int4, factored rank 32": {"store": "int4", "gradient": "factored", "rank": 32},
    "sketch rank 32": {"store": "sketch", "rank": 32},
}


class Blocks(nn.Module):
    """Blocks of a GPT, without embedding and head."""

    def __init__(self, depth: int, width: int, heads: int, recompute: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, 4) for _ in range(depth))
        self.recompute = recompute

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, cosine, sine, use_reentrant=False) if self.recompute else block(x, cosine, sine)
        return x


def run(
    width: int = 512,
    tokens: int = 1024,
    depth: int = 2,
    targets: str = "all",
    repeats: int = 7,
    warmup: int = 2,
    names: Sequence[str] | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Times one forward and backward pass of blocks of nanochat's d8 (width 512) on one sequence; candidates take turns.

    Args:
        width: channels; heads have 128 of them.
        tokens: of the sequence.
        depth: blocks.
        targets: of the conversion, see MoleConfig.
        repeats, warmup: rounds, see ``mango.bench.timing.paired``.
        names: rows to run, of CANDIDATES; None = all. "dense" is always run.
        device: where.
        progress: told the name of what is being prepared.

    Returns:
        One row per candidate: name, ratio (median of paired times over dense), median_ms, saved_mib (what autograd keeps, by the ledger)
        and saved_ratio to dense.

    Raises: ConfigError for an unknown row or a size that is not legal.
    """
    for name in names or ():
        if name not in CANDIDATES:
            raise ConfigError.of("names", name, "one of " + ", ".join(CANDIDATES))
    if width < 128 or width % 128:
        raise ConfigError.of("width", width, "a multiple of 128, the channels of a head")
    for field, value in {"tokens": tokens, "depth": depth}.items():
        if value < 1:
            raise ConfigError.of(field, value, "an integer >= 1")
    x = gaussian((1, tokens, width), (0,), device)
    angles = positions(tokens, 128, x)
    dense = Blocks(depth, width, width // 128, recompute=False).to(device)
    passes: dict[str, Callable[[], object]] = {}
    saved: dict[str, int] = {}
    for name, dials in CANDIDATES.items():
        if names is not None and name not in (*names, BASE):
            continue
        if progress is not None:
            progress(name)
        model = copy.deepcopy(dense)
        model.recompute = name == CHECKPOINTED
        if dials is not None:
            convert(model, MoleConfig(targets=targets, **dials))
        passes[name] = _pass(model, x, angles)
        ledger = MemoryLedger(model)
        with ledger.activations():
            model(x.requires_grad_(), *angles)
        saved[name] = ledger.saved_activations
    if progress is not None:
        progress("timing")
    times = paired(passes, repeats, warmup)
    return [
        {
            "name": name,
            "ratio": times.ratio(name, BASE),
            "median_ms": 1e3 * times.median(name),
            "saved_mib": saved[name] / 2**20,
            "saved_ratio": saved[name] / saved[BASE],
        }
        for name in passes
    ]


def _pass(model: nn.Module, x: Tensor, angles: tuple[Tensor, Tensor]) -> Callable[[], None]:
    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
            parameter.__dict__.pop("factors", None)
        model(x.detach().requires_grad_(), *angles).square().mean().backward()

    return run

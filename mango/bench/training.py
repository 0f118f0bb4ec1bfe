"""``mango bench training``: what share of a training step the optimizer takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional

from mango import optim
from mango.bench.timing import paired
from mango.draws import counter_generator
from mango.errors import ConfigError
from mango.models.gpt import GPT

MODELS = {
    "gpt-124m": {"vocabulary": 50304, "depth": 12, "width": 768, "heads": 12},  # GPT-2's sizes, embedding and head tied as there
    "tiny": {"vocabulary": 96, "depth": 1, "width": 64, "heads": 2},
}
METHODS = ("adamw", "mango")

Row = dict[str, str | float | int]


def run(
    model: str = "gpt-124m",
    tokens: int = 4096,
    sequence: int = 1024,
    repeats: int = 3,
    names: Sequence[str] = METHODS,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Times forward and backward passes of a language model in single precision, then steps on the gradients that they left.

    Every method steps all parameters with its default options; the weights move at rate 0, so that all see the same gradients.

    Args:
        model: a name of ``MODELS``.
        tokens: in one training step, a multiple of ``sequence``.
        sequence: tokens that attend to each other.
        repeats: passes and steps that are timed, after one that is not.
        names: optimizers of the registry.
        device: where.
        progress: told what is being done.

    Returns:
        Rows with name, parameters, tokens, passes_s (median seconds of forward and backward), step_s and worst_s (median and worst of the
        optimizer's step) and share (step / (passes + step)).

    Raises:
        ConfigError: for an unknown model or optimizer, or tokens that do not divide.
    """
    if model not in MODELS:
        raise ConfigError.of("model", model, "one of " + ", ".join(MODELS))
    if sequence < 1 or tokens < sequence or tokens % sequence:
        raise ConfigError.of("tokens", tokens, f"a multiple of the sequence, {sequence}")
    if repeats < 1:
        raise ConfigError.of("repeats", repeats, "an integer >= 1")
    torch.manual_seed(0)
    network = GPT(**MODELS[model]).to(device)
    network.head.weight = nn.Parameter(network.embedding.weight.detach() * 1e-3)  # the head's own size at the start
    network.embedding.weight = network.head.weight
    shape, vocabulary = (tokens // sequence, sequence), MODELS[model]["vocabulary"]
    words = torch.randint(vocabulary, shape, generator=counter_generator((0,), device), device=device)

    def passes() -> None:
        for param in network.parameters():
            param.grad = None
        functional.cross_entropy(network(words).flatten(0, 1), words.flatten()).backward()

    seconds = []
    for turn in range(repeats + 1):
        if progress is not None:
            progress(f"passes {turn} of {repeats}")
        start = perf_counter()
        passes()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    spent = sorted(seconds[1:])[repeats // 2]
    if progress is not None:
        progress("steps")
    optimizers = {name: optim.build(name, network, lr=0.0) for name in names}
    times = paired({name: optimizer.step for name, optimizer in optimizers.items()}, repeats=repeats, warmup=2)
    return [
        {
            "name": name,
            "parameters": sum(param.numel() for param in network.parameters()),
            "tokens": tokens,
            "passes_s": spent,
            "step_s": times.median(name),
            "worst_s": times.worst(name),
            "share": times.median(name) / (spent + times.median(name)),
        }
        for name in names
    ]

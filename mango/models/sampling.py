"""Text from a language model, one token at a time, with keys and values kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango.errors import ConfigError

if TYPE_CHECKING:
    from mango.models.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,  # (b, t) int64, t >= 1
    count: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:  # (b, t + count) int64
    """The prompt and ``count`` more tokens, each drawn from what the model says about the next.

    Each token costs one pass over itself: the keys and values of those before it are kept. The draws depend on the seed alone.

    Args:
        model: in the mode that it is to be used in; nothing about it changes.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: draw among so many of the likeliest tokens; None = all.

    Raises: ConfigError.
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ConfigError.of("prompt", tuple(prompt.shape), "a shape (b, t) with t >= 1")
    if temperature < 0:
        raise ConfigError.of("temperature", temperature, "a number >= 0")
    if top_k is not None and top_k < 1:
        raise ConfigError.of("top_k", top_k, "an integer >= 1, or None")
    past = model.past(prompt.shape[1] + count)
    generator = torch.Generator(prompt.device).manual_seed(seed)
    tokens, new = prompt, prompt
    for _ in range(count):
        logits = model(new, past)[:, -1]  # (b, vocabulary)
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            if top_k is not None and top_k < logits.shape[-1]:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, new), 1)
    return tokens

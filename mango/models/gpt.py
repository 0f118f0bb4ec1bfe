"""A GPT of nanochat's shape (Karpathy 2025): rotary positions, QK norm, grouped queries, relu² MLP, norms without parameters, no biases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mango.errors import ConfigError
from mango.models.head import streamed_loss

ROTARY_BASE = 10_000.0  # Su et al., arXiv:2104.09864
SOFTCAP = 15.0  # logits lie in (-15, 15), as in nanochat


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, without parameters (arXiv:1910.07467)."""
    return functional.rms_norm(x, (x.shape[-1],))


class Past:
    """Keys and values of one layer for the tokens seen so far, so that sampling pays for each token once.

    Args:
        capacity: tokens that fit. The memory is taken when the first keys come, in their shape and type.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kept: Tensor | None = None  # (2, b, kv_heads, capacity, channels)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # (b, kv_heads, t, channels) -> (b, kv_heads, length, channels)
        """Append keys and values. Returns: all so far. Raises: ConfigError when they do not fit."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ConfigError.of("capacity", self.capacity, f"at least the {end} tokens that are asked for")
        if self._kept is None:
            self._kept = key.new_empty(2, *key.shape[:2], self.capacity, key.shape[3])
        self._kept[0, :, :, self.length : end] = key
        self._kept[1, :, :, self.length : end] = value
        self.length = end
        return self._kept[0, :, :, :end], self._kept[1, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention whose queries and keys are rotated, then normalised (arXiv:2104.09864, arXiv:2302.05442).

    With fewer heads of keys and values than of queries, consecutive queries share one (arXiv:2305.13245).
    """

    def __init__(self, width: int, heads: int, kv_heads: int | None = None) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        self.channels, self.grouped = width // heads, kv_heads < heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * self.channels, bias=False)
        self.value = nn.Linear(width, kv_heads * self.channels, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width // heads, elementwise_affine=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, past: Past | None = None) -> Tensor:  # (b, t, width) -> (b, t, width)
        query, key, value = (layer(x).unflatten(-1, (-1, self.channels)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        query, key = self.norm(rotated(query, cosine, sine)), self.norm(rotated(key, cosine, sine))  # (b, heads or kv_heads, t, channels)
        mask = None
        if past is not None:
            seen = past.length
            key, value = past.extend(key, value)
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=x.device).tril(seen)  # (t, length)
        mixed = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Feedforward(nn.Module):
    """Two matrices around relu² (So et al., arXiv:2109.08668)."""

    def __init__(self, width: int, multiple: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, multiple * width, bias=False)
        self.down = nn.Linear(multiple * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (b, t, width) -> (b, t, width)
        return self.down(functional.relu(self.up(x)).square())


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int, ffn: int, kv_heads: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(width, heads, kv_heads)
        self.feedforward = Feedforward(width, ffn)
        self.norm = nn.RMSNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, past: Past | None = None) -> Tensor:  # (b, t, width) -> (b, t, width)
        x = x + self.attention(self.norm(x), cosine, sine, past)
        return x + self.feedforward(self.norm(x))


class GPT(nn.Module):
    """Tokens to the logits of the next token.

    Every matrix starts normal with variance 1 / inputs; those that write into the residual stream are divided by sqrt(2 depth), as in
    GPT-2. nanochat starts the latter at zero; then a model whose blocks are frozen would have no blocks, and be too weak a control.
    The embedding starts with unit variance and the head, which is not tied to it, nearly at zero, so that the first loss is
    ln(vocabulary).

    Args:
        vocabulary: number of tokens.
        depth: blocks; the one dial of nanochat, from which the other sizes follow when they are None.
        width: channels of the residual stream; None = 64 for each block.
        heads: attention heads; each has width / heads channels, an even number. None = heads of 128 channels, or of the next larger size
            that divides the width.
        kv_heads: heads of keys and values, a divisor of the heads; None = as many as heads.
        ffn: hidden channels of the feed-forward part, as a multiple of the width.

    Attributes:
        recompute: keep the input of each block alone for the backward pass, and compute the block again (arXiv:1604.06174).

    Raises: ConfigError.
    """

    def __init__(
        self, vocabulary: int, depth: int = 3, width: int | None = None, heads: int | None = None, kv_heads: int | None = None, ffn: int = 4
    ) -> None:
        super().__init__()
        for name, value in {"vocabulary": vocabulary, "depth": depth, "ffn": ffn}.items():
            if value < 1:
                raise ConfigError.of(f"model.{name}", value, "an integer >= 1")
        width = 64 * depth if width is None else width
        if heads is None:
            heads = max(count for count in range(1, max(1, width // 128) + 1) if width % (2 * count) == 0 or count == 1)
        if heads < 1:
            raise ConfigError.of("model.heads", heads, "an integer >= 1")
        if width < 1 or width % (2 * heads):
            raise ConfigError.of("model.width", width, f"a multiple of {2 * heads}, twice model.heads")
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ConfigError.of("model.kv_heads", kv_heads, f"a divisor of model.heads = {heads}")
        self.channels = width // heads
        self.recompute = False
        self.embedding = nn.Embedding(vocabulary, width)
        blocks = [Block(width, heads, ffn, kv_heads) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for block in blocks:
            for layer in (block.attention.out, block.feedforward.down):
                nn.init.normal_(layer.weight, std=(2 * depth * layer.in_features) ** -0.5)
        nn.init.normal_(self.head.weight, std=1e-3)

    def forward(
        self,
        tokens: Tensor,  # (b, t) int64
        past: Sequence[Past] | None = None,
        targets: Tensor | None = None,  # (b, t) int64
    ) -> Tensor:
        """Logits of the token after each, (b, t, vocabulary); with ``past``, one for each block, ``tokens`` follow those that it has seen.

        With ``targets`` the mean cross-entropy instead, for which few logits exist at one time (see ``mango.models.head``).
        """
        x = norm(self.embedding(tokens))
        cosine, sine = positions(tokens.shape[1], self.channels, x, start=past[0].length if past else 0)
        for number, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                # re-entrant: what it keeps is saved by autograd, where the memory ledger counts it
                x = checkpoint(block, x, cosine, sine, use_reentrant=True)
            else:
                x = block(x, cosine, sine, past[number] if past else None)
        if targets is not None:
            return streamed_loss(norm(x).flatten(0, 1), self.head.weight, targets.flatten(), SOFTCAP)
        return SOFTCAP * torch.tanh(self.head(norm(x)).float() / SOFTCAP)

    def past(self, capacity: int) -> list[Past]:
        """Room for the keys and values of ``capacity`` tokens in every block."""
        return [Past(capacity) for _ in self.blocks]

    def write(self, prompt: Tensor, count: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> Tensor:
        """The prompt and ``count`` tokens more: see ``mango.models.sampling.generate``."""
        from mango.models.sampling import generate

        return generate(self, prompt, count, temperature, top_k, seed)


def positions(length: int, channels: int, like: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles from place ``start`` on, (length, channels / 2), with dtype and device of ``like``."""
    frequencies = ROTARY_BASE ** -torch.linspace(0, 1, channels // 2 + 1, device=like.device)[:-1]
    angles = torch.outer(torch.arange(start, start + length, device=like.device), frequencies)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: channel i and channel i + half turn together, by an angle that grows with the position.

    Args:
        x: (..., t, channels).
        cosine, sine: (t, channels / 2), of the angles.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)

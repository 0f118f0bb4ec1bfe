"""A byte-sized GPT of nanochat's shape (Karpathy 2025): rotary positions, QK norm, relu² MLP, norms without parameters, no biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mango.errors import ConfigError

ROTARY_BASE = 10_000.0  # Su et al., arXiv:2104.09864
SOFTCAP = 15.0  # logits lie in (-15, 15), as in nanochat


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, without parameters (arXiv:1910.07467)."""
    return functional.rms_norm(x, (x.shape[-1],))


class Attention(nn.Module):
    """Causal self-attention whose queries and keys are rotated, then normalised (arXiv:2104.09864, arXiv:2302.05442)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width // heads, elementwise_affine=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # (b, t, width) -> (b, t, width)
        query, key, value = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        query, key = self.norm(rotated(query, cosine, sine)), self.norm(rotated(key, cosine, sine))  # (b, heads, t, width / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
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

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feedforward = Feedforward(width, ffn)
        self.norm = nn.RMSNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # (b, t, width) -> (b, t, width)
        x = x + self.attention(self.norm(x), cosine, sine)
        return x + self.feedforward(self.norm(x))


class GPT(nn.Module):
    """Tokens to the logits of the next token.

    Every matrix starts normal with variance 1 / inputs; those that write into the residual stream are divided by sqrt(2 depth), as in
    GPT-2. nanochat starts the latter at zero; then a model whose blocks are frozen would have no blocks, and be too weak a control.
    The embedding starts with unit variance and the head, which is not tied to it, nearly at zero, so that the first loss is
    ln(vocabulary).

    Args:
        vocabulary: number of tokens.
        depth: blocks.
        width: channels of the residual stream.
        heads: attention heads; each has width / heads channels, an even number.
        ffn: hidden channels of the feed-forward part, as a multiple of the width.

    Raises: ConfigError.
    """

    def __init__(self, vocabulary: int, depth: int = 3, width: int = 128, heads: int = 4, ffn: int = 4) -> None:
        super().__init__()
        for name, value in {"vocabulary": vocabulary, "depth": depth, "heads": heads, "ffn": ffn}.items():
            if value < 1:
                raise ConfigError.of(f"model.{name}", value, "an integer >= 1")
        if width < 1 or width % (2 * heads):
            raise ConfigError.of("model.width", width, f"a multiple of {2 * heads}, twice model.heads")
        self.channels = width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        blocks = [Block(width, heads, ffn) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for block in blocks:
            for layer in (block.attention.out, block.feedforward.down):
                nn.init.normal_(layer.weight, std=(2 * depth * layer.in_features) ** -0.5)
        nn.init.normal_(self.head.weight, std=1e-3)

    def forward(self, tokens: Tensor) -> Tensor:  # (b, t) int64 -> (b, t, vocabulary)
        x = norm(self.embedding(tokens))
        cosine, sine = positions(tokens.shape[1], self.channels, x)
        for block in self.blocks:
            x = block(x, cosine, sine)
        return SOFTCAP * torch.tanh(self.head(norm(x)).float() / SOFTCAP)


def positions(length: int, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, (length, channels / 2), with dtype and device of ``like``."""
    frequencies = ROTARY_BASE ** -torch.linspace(0, 1, channels // 2 + 1, device=like.device)[:-1]
    angles = torch.outer(torch.arange(length, device=like.device), frequencies)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: channel i and channel i + half turn together, by an angle that grows with the position.

    Args:
        x: (..., t, channels).
        cosine, sine: (t, channels / 2), of the angles.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)

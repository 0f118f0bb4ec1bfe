"""nanochat's GPT as far as memory goes: width 64 times the depth, heads of 128, FFN four times as wide with relu², untied embeddings.

No biases and no learnt norms; rotary positions; queries and keys are normalised; logits are bounded by 15 tanh(x / 15) in float32. After
Karpathy's nanochat (2025), nanochat/gpt.py; written anew from its description.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 128


class GPT(nn.Module):
    """Tokens (batch, time) and targets of that shape -> the mean cross entropy."""

    def __init__(self, depth: int, vocabulary: int = 65536, width: int | None = None, head: int = HEAD) -> None:
        super().__init__()
        width = 64 * depth if width is None else width
        heads = max(1, width // head)
        self.head = width // heads
        self.wte = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = _norm(self.wte(tokens))  # (b, t, c)
        rotation = _rotary(x.shape[1], self.head, x)
        for block in self.blocks:
            x = block(x, rotation)
        logits = 15.0 * torch.tanh(self.lm_head(_norm(x)).float() / 15.0)  # (b, t, vocabulary)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:  # (b, t, c)
        y = _norm(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, self.head)) for layer in (self.q, self.k, self.v))  # (b, t, heads, head)
        q, k = (_norm(_rotate(z, rotation)).transpose(1, 2) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(_norm(x))).square())


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _rotary(time: int, head: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, t, 1, head / 2) in x's dtype."""
    frequency = 10000.0 ** -(torch.arange(0, head, 2, device=x.device, dtype=torch.float32) / head)
    angle = torch.outer(torch.arange(time, device=x.device, dtype=torch.float32), frequency)[None, :, None]
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)

"""TinyFormer: a transformer over layers, six blocks deep with one block's weights, and an LSTM over layers as its ablation."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mango.policy.actions import Actions
from mango.policy.base import LAYER, WORLD, Observation, Policy

PARAMETERS = 100_000  # a policy has fewer
FEATURES = (len(LAYER), len(WORLD))


@dataclass(frozen=True)
class Batch:
    """Observations of equal or different numbers of layers, padded.

    Attributes:
        layers: (b, n, features) float32. world: (b, features). present: (b, n) bool, False where a row is padding.
    """

    layers: Tensor
    world: Tensor
    present: Tensor

    @classmethod
    def of(cls, seen: list[tuple[Tensor, Tensor]]) -> Batch:
        """From (layers, world) of each observation."""
        most = max(len(layers) for layers, _ in seen)
        padded = torch.stack([functional.pad(layers, (0, 0, 0, most - len(layers))) for layers, _ in seen])
        present = torch.tensor([[place < len(layers) for place in range(most)] for layers, _ in seen])
        return cls(padded, torch.stack([world for _, world in seen]), present)


class Normaliser(nn.Module):
    """Running mean and deviation of each feature, saved with the policy; only ``update`` moves them."""

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("square", torch.zeros(features))  # mean squared distance to the mean
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:  # (..., features)
        if float(self.count) == 0.0:
            return x
        return ((x - self.mean) / (self.square.sqrt() + 1e-2)).clamp(-5.0, 5.0)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:  # (rows, features)
        """Take more rows into account (Chan et al. 1983)."""
        rows, total = len(x), float(self.count) + len(x)
        mean = x.mean(0)
        gap = mean - self.mean
        self.square.mul_(float(self.count)).add_((x - mean).square().sum(0)).add_(gap.square(), alpha=float(self.count) * rows / total)
        self.square.div_(total)
        self.mean.add_(gap, alpha=rows / total)
        self.count.fill_(total)


class LearnedPolicy(nn.Module, Policy):
    """What the learned policies share: normalised tokens in, a score for each action of each layer and a value out.

    An action's score is the sum of those of its rank, its bits and its moments, so that actions share what is learned about them.

    Args:
        width: of a token.
        actions: what it may choose.
        features: of a layer's token and of the run's.
    """

    kind = ""  # as in the registry
    table: Tensor  # (A, 3)

    def __init__(self, width: int, actions: Actions | None = None, features: tuple[int, int] = FEATURES) -> None:
        super().__init__()
        self.actions = actions or Actions()
        self.width = width
        self.normalise_layers, self.normalise_world = Normaliser(features[0]), Normaliser(features[1])
        self.embed_layer, self.embed_world = nn.Linear(features[0], width), nn.Linear(features[1], width)
        sizes = (len(self.actions.ranks), len(self.actions.bits), len(self.actions.moments))
        self.heads = nn.ModuleList([nn.Linear(width, size) for size in sizes])
        self.value = nn.Linear(width, 1)
        for head in (*self.heads, self.value):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.register_buffer("table", torch.tensor(self.actions.table), persistent=False)

    @abstractmethod
    def mix(self, tokens: Tensor, present: Tensor) -> Tensor:
        """(b, 1 + n, width) -> the same; the run's token is the first."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores (b, n, A) and values (b,)."""
        layers = self.embed_layer(self.normalise_layers(batch.layers))
        world = self.embed_world(self.normalise_world(batch.world))
        ones = torch.ones_like(batch.present[:, :1])
        tokens = self.mix(torch.cat([world[:, None], layers], dim=1), torch.cat([ones, batch.present], dim=1))
        parts = [head(tokens[:, 1:]) for head in self.heads]
        scores = sum(part[..., self.table[:, place]] for place, part in enumerate(parts))
        assert isinstance(scores, Tensor)
        return scores, self.value(tokens[:, 0]).squeeze(-1)

    def learn_scales(self, batch: Batch) -> None:
        """Move the running normalisation."""
        self.normalise_layers.update(batch.layers[batch.present])
        self.normalise_world.update(batch.world)

    @torch.inference_mode()
    def scores(self, seen: Observation) -> Tensor:
        return self(Batch.of([(seen.layers, seen.world)]))[0][0].log_softmax(-1)


class TinyFormer(LearnedPolicy):
    """A pre-norm transformer whose blocks share their weights (ALBERT, arXiv:1909.11942), without positions: layers are told apart by
    their features, depth among them, so the answer does not depend on the order in which they are listed.

    Args:
        width: of a token. depth: applications of the one block. heads: of its attention. hidden: of its feed-forward part.

    >>> sum(parameter.numel() for parameter in TinyFormer().parameters()) < PARAMETERS
    True
    """

    kind = "tinyformer"

    def __init__(
        self,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        hidden: int = 64,
        actions: Actions | None = None,
        features: tuple[int, int] = FEATURES,
    ) -> None:
        super().__init__(width, actions, features)
        self.depth, self.count = depth, heads
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.out, self.down):  # what is added to the stream starts small, as the block is applied again and again
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * depth))
            nn.init.zeros_(layer.bias)

    def mix(self, tokens: Tensor, present: Tensor) -> Tensor:
        mask = None if bool(present.all()) else present[:, None, None, :]  # nobody looks at padding
        for _ in range(self.depth):
            query, key, value = self._split(tokens)
            tokens = self._after(tokens, functional.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        return self.norm3(tokens)

    def _split(self, tokens: Tensor) -> list[Tensor]:
        """Queries, keys and values, (b, heads, 1 + n, width / heads) each."""
        parts = self.qkv(self.norm1(tokens)).chunk(3, dim=-1)
        return [part.unflatten(-1, (self.count, -1)).transpose(1, 2) for part in parts]

    def _after(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the block, behind its attention (b, heads, 1 + n, width / heads)."""
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.down(functional.gelu(self.up(self.norm2(tokens))))

    @torch.no_grad()
    def attention(self, seen: Observation) -> Tensor:
        """(depth, 1 + n, 1 + n): who looks at whom, mean over the heads; the run's token is the first."""
        world, layers = self.embed_world(self.normalise_world(seen.world)), self.embed_layer(self.normalise_layers(seen.layers))
        tokens = torch.cat([world[None], layers])[None]  # (1, 1 + n, width)
        found = []
        for _ in range(self.depth):
            query, key, value = self._split(tokens)
            weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
            found.append(weights.mean(1)[0])
            tokens = self._after(tokens, weights @ value)
        return torch.stack(found)


class LSTMPolicy(LearnedPolicy):
    """The ablation: the run's token and then the layers in their order, read by an LSTM in both directions."""

    kind = "lstm"
    equivariant = False

    def __init__(self, width: int = 64, actions: Actions | None = None, features: tuple[int, int] = FEATURES) -> None:
        super().__init__(width, actions, features)
        self.forwards, self.backwards = nn.LSTM(width, width, batch_first=True), nn.LSTM(width, width, batch_first=True)
        self.join = nn.Linear(2 * width, width)

    def mix(self, tokens: Tensor, present: Tensor) -> Tensor:
        tokens = tokens * present[..., None]
        there = self.forwards(tokens)[0]
        lengths = present.sum(1)  # padding comes last: turned round, it must not come first
        order = (lengths[:, None] - 1 - torch.arange(tokens.shape[1])) % tokens.shape[1]
        index = order[..., None].expand_as(tokens)
        back = self.backwards(tokens.gather(1, index))[0].gather(1, index)
        return tokens + self.join(torch.cat([there, back], dim=-1))

"""Models that this project did not write, small, with tasks on data that is always there, and a plain training script for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mango.compat import torchvision, transformers

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model and its task.

    Attributes:
        build: a new model, from the global seed.
        batch: generator -> inputs and targets of one step.
        steps: of a whole training run.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    steps: int = 150


def train(case: Case, factory: Callable[[Any], torch.optim.Optimizer], seed: int = 0, steps: int | None = None) -> float:
    """A user's training script. Returns the mean training loss over the last fifth of the steps."""
    torch.manual_seed(seed)
    model = case.build().train()
    optimizer = factory(model.parameters())
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps or case.steps):
        inputs, targets = case.batch(draw)
        loss = functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, len(losses) // 5) :]
    return sum(last) / len(last)


# ---------------------------------------------------------------- tasks


@cache
def text() -> Tensor:
    """English that every Python carries, the language reference of ``help()``, as 96 tokens."""
    from pydoc_data.topics import topics

    raw = "".join(topics[key] for key in sorted(topics)).encode("ascii", "ignore")
    return (torch.tensor(list(raw)) - 32).clamp(0, 95)


def words(draw: torch.Generator, rows: int = 16, length: int = 32) -> Batch:
    """Sequences of text, and the token after each."""
    starts = torch.randint(len(text()) - length - 1, (rows, 1), generator=draw)
    window = text()[starts + torch.arange(length + 1)]
    return window[:, :-1], window[:, 1:]


@cache
def digits() -> Batch:
    """scikit-learn's 8 x 8 digits, one channel, standardised."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(found.target)


def images(draw: torch.Generator, noise: float = 1.2, rows: int = 32, size: int = 32) -> Batch:
    """Digits enlarged to three channels, shifted, in noise: a task that is not solved to the last image."""
    pictures, labels = digits()
    chosen = torch.randint(len(labels), (rows,), generator=draw)
    large = functional.interpolate(pictures[chosen], size, mode="bilinear").expand(-1, 3, -1, -1)
    shift = torch.randint(-size // 4, size // 4, (2,), generator=draw).tolist()
    return large.roll(shift, (2, 3)) + noise * torch.randn(large.shape, generator=draw), labels[chosen]


def flat(draw: torch.Generator) -> Batch:
    """Digits as vectors of 64 values, in noise."""
    pictures, labels = digits()
    chosen = torch.randint(len(labels), (64,), generator=draw)
    vectors = pictures[chosen].flatten(1)
    return vectors + torch.randn(vectors.shape, generator=draw), labels[chosen]


def waves(draw: torch.Generator) -> Batch:
    """One channel of 128 samples: sums of two tones in noise; the class is the first one's pitch."""
    pitch = torch.randint(12, (48, 2), generator=draw)
    phase = 6.3 * torch.rand(48, 2, 1, generator=draw)
    tones = torch.sin(torch.arange(128.0) * (pitch + 2).unsqueeze(-1) * 0.09 + phase)  # (48, 2, 128)
    wave = tones[:, 0] + 0.5 * tones[:, 1] + 0.7 * torch.randn(48, 128, generator=draw)
    return wave.unsqueeze(1), pitch[:, 0]


def bags(draw: torch.Generator) -> Batch:
    """Bags of 12 of 4000 words whose frequencies fall as 1 / rank; each word votes for one of 16 classes."""
    weights = 1.0 / torch.arange(1.0, 4001.0)
    found = torch.multinomial(weights, 64 * 12, replacement=True, generator=draw).view(64, 12)
    votes = functional.one_hot((found * 2654435761 >> 7) % 16, 16).sum(1).float()
    return found, (votes + 0.5 * torch.rand(votes.shape, generator=draw)).argmax(-1)


# ---------------------------------------------------------------- models


def resnet() -> nn.Module:
    torchvision("a residual network")
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def mobilenet() -> nn.Module:
    torchvision("depthwise convolutions")
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(num_classes=10, width_mult=0.35, dropout=0.0)
    model.features[0][0].stride = (1, 1)  # as for small images: with the stem of large ones it learns nothing in 150 steps
    return model


def vit() -> nn.Module:
    torchvision("a vision transformer")
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=96, mlp_dim=192, num_classes=10)


class Encoder(nn.Module):
    """nn.TransformerEncoder as a causal language model, its embedding tied to the head."""

    def __init__(self, width: int = 96, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, width)
        self.place = nn.Parameter(0.02 * torch.randn(32, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 96, bias=False)
        if tied:
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.embedding(tokens) + self.place, mask=mask, is_causal=True))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int = 128) -> None:
        super().__init__()
        self.embedding, self.recurrent, self.head = nn.Embedding(96, 64), kind(64, width, batch_first=True), nn.Linear(width, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(tokens))[0])


class Experts(nn.Module):
    """A language model whose feed-forward part is a mixture of experts in stacks of three dimensions, two of four chosen a token."""

    def __init__(self, width: int = 64, experts: int = 4) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(96, width), nn.GRU(width, width, batch_first=True)
        self.router, self.norm, self.head = nn.Linear(width, experts), nn.LayerNorm(width), nn.Linear(width, 96)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) * (2 * width) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.recurrent(self.embedding(tokens))[0]
        weight, chosen = self.router(x).topk(2)
        gate = torch.zeros_like(self.router(x)).scatter(-1, chosen, weight.softmax(-1))  # (b, t, experts)
        hidden = functional.gelu(torch.einsum("btw,ewh->bteh", self.norm(x), self.up))
        return self.head(x + torch.einsum("bteh,ehw,bte->btw", hidden, self.down, gate))


class Llama(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        library = transformers("a LLaMA")
        sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        self.model = library.LlamaForCausalLM(
            library.LlamaConfig(vocab_size=96, max_position_embeddings=64, tie_word_embeddings=tied, **sizes)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


def bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(4000, 64, mode="sum"), nn.LayerNorm(64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))


def audio() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 48), (48, 64), (64, 96)):
        layers += [nn.Conv1d(inputs, outputs, 5, stride=2, padding=2), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(96, 12))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 72), nn.ReLU(), nn.Linear(72, 10))


CASES = {
    "resnet": Case(resnet, images),
    "mobilenet": Case(mobilenet, lambda draw: images(draw, noise=0.5)),
    "vit": Case(vit, images),
    "encoder, tied": Case(Encoder, words),
    "encoder": Case(lambda: Encoder(tied=False), words),
    "lstm": Case(lambda: Recurrent(nn.LSTM), words),
    "gru": Case(lambda: Recurrent(nn.GRU), words),
    "experts": Case(Experts, words),
    "llama": Case(lambda: Llama(tied=False), words),
    "llama, tied": Case(lambda: Llama(tied=True), words),
    "bag": Case(bag, bags),
    "audio": Case(audio, waves),
    "dense": Case(dense, flat),
}

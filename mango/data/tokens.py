"""Text as tokens: one memory-mapped file for each split, cut into windows whose order is a function of seed and epoch."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mango.data.base import derive, identity_of
from mango.data.sources import cache_root, locked
from mango.data.text import TextData
from mango.data.tokenizer import Tokenizer, whole_characters
from mango.errors import ConfigError


@dataclass(frozen=True)
class TokenData:
    """Tokens to predict from the tokens before them; documents follow each other, each behind a token that starts it.

    Attributes:
        name, title, source: as for ``mango.data.text.TextData``.
        splits: (n,) int32 each, mapped from the cache and never moved to a device: batches are.
        texts: bytes of text behind the predicted tokens of each split, which are all but the first.
        tokenizer: from text to tokens and back.
        sequence: tokens in a window.
        device: where batches are wanted; None = on the CPU.
    """

    name: str
    title: str
    source: str
    splits: dict[str, Tensor]
    texts: Mapping[str, int]
    tokenizer: Tokenizer
    sequence: int
    device: torch.device | None = None
    unit: str = field(default="tokens", init=False)

    def to(self, device: torch.device) -> TokenData:
        return TokenData(self.name, self.title, self.source, self.splits, self.texts, self.tokenizer, self.sequence, device)

    def model_arguments(self) -> dict[str, int]:
        return {"vocabulary": len(self.tokenizer)}

    def files(self) -> dict[str, str]:
        """The tokenizer, without which the model's numbers mean nothing."""
        return {"tokenizer.json": self.tokenizer.text}

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """``size`` windows of step ``step``: in each epoch every window once, in an order and from a start of the epoch's own.

        Returns: inputs and, one token later, targets: (size, sequence) int64 each.
        """
        train = self.splits["train"]
        count = (len(train) - 1) // self.sequence  # windows in an epoch
        starts = []
        for number in range(step * size, (step + 1) * size):
            epoch, place = divmod(number, count)
            offset, order = _epoch(seed, epoch, len(train) - 1 - count * self.sequence, count)
            starts.append(offset + self.sequence * int(order[place]))
        windows = train[torch.tensor(starts)[:, None] + torch.arange(self.sequence + 1)].long().to(self.device)  # (size, sequence + 1)
        return windows[:, :-1], windows[:, 1:]

    def evaluation(self, split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As for bytes: windows that do not overlap; every token but the first is predicted once."""
        for inputs, targets in TextData(self.name, self.title, self.source, self.splits, self.sequence).evaluation(split, size):
            yield inputs.to(self.device), targets.to(self.device)

    def scores(self, split: str, loss: float, accuracy: float) -> dict[str, float]:
        """Bits per byte of the text, whatever the tokenizer: what all predicted tokens cost over the bytes that they stand for."""
        return {"bits_per_byte": loss / math.log(2) * (len(self.splits[split]) - 1) / self.texts[split]}

    def encode(self, text: str) -> Tensor:
        """A text's tokens, (n,) int64."""
        return torch.from_numpy(np.concatenate(list(self.tokenizer.encode(np.frombuffer(text.encode(), np.uint8))))).long()

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (n,)."""
        return self.tokenizer.decode(tokens.tolist())

    def identity(self) -> dict[str, str | int]:
        digests = [self.tokenizer.digest, *(hashlib.sha256(split.numpy().tobytes()).hexdigest() for split in self.splits.values())]
        return identity_of(self, digests)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, slack: int, count: int) -> tuple[int, Tensor]:
    """Where an epoch's first window starts, at most ``slack`` tokens in, and the order of its ``count`` windows."""
    generator = torch.Generator().manual_seed(derive(seed, "epoch", epoch))
    offset = int(torch.randint(slack + 1, (), generator=generator))
    return offset, torch.randperm(count, generator=generator)


def tokenized(text: TextData, key: str, vocabulary: int | None, given: Path | None = None) -> TokenData:
    """The splits of a text as tokens of a tokenizer that is trained on its training split; made once, then mapped from the cache.

    Args:
        key: of the text's source.
        vocabulary: tokens of the tokenizer to train.
        given: file of a tokenizer to use instead.

    Raises: ConfigError when a split has no more tokens than a window; DataError when the text is not UTF-8.
    """
    parts = {name: whole_characters(split.numpy()) for name, split in text.splits.items()}
    folder = cache_root() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    trained = f"{key}-{_range(text.splits['train'])}-{vocabulary}"
    with locked(folder / f"{trained}.lock"):
        saved = given or folder / f"{trained}.json"
        if given is None and vocabulary is not None and not saved.is_file():
            _replace(saved, [Tokenizer.trained(parts["train"], vocabulary).text.encode()])
        tokenizer = Tokenizer(saved.read_text())
        splits = {}
        for name, part in parts.items():
            target = folder / f"{key}-{_range(text.splits[name])}-{tokenizer.digest[:16]}.i32"
            if not target.is_file():
                _replace(target, tokenizer.encode(part))
            splits[name] = torch.from_numpy(np.memmap(target, np.int32, "c"))
    for name, split in splits.items():
        if len(split) <= text.sequence:
            raise ConfigError.of(
                f"data.{name}", len(parts[name]), f"bytes that make more tokens than a window, data.sequence = {text.sequence}"
            )
    texts = {name: len(part) - tokenizer.nbytes(int(splits[name][0])) for name, part in parts.items()}
    return TokenData(text.name, text.title, text.source, splits, texts, tokenizer, text.sequence)


def _range(split: Tensor) -> str:
    """Names a cut of a mapped text."""
    return f"{split.storage_offset()}-{len(split)}"


def _replace(target: Path, content: Iterator[np.ndarray] | list[bytes]) -> None:
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as file:
        for piece in content:
            file.write(bytes(piece))
    os.replace(partial, target)

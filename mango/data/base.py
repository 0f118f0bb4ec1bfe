"""What the training loop asks of data, whatever they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Progress = Callable[[int], None]  # told how many items were decoded so far


class Dataset(Protocol):
    """Data ready to train on. Targets are classes or tokens: the loss is the mean cross-entropy over them."""

    @property
    def name(self) -> str:
        """As ``mango.data.load`` takes it."""

    @property
    def source(self) -> str:
        """Where it was found: local, download or embedded."""

    @property
    def title(self) -> str:
        """What the data truly is, for captions."""

    @property
    def unit(self) -> str:
        """What one target is, in the plural: throughput is counted in it."""

    @property
    def splits(self) -> Mapping[str, Sized]:
        """ "train", "test" and, when asked for, "validation"."""

    def to(self, device: torch.device) -> Dataset:
        """The same data on ``device``."""

    def model_arguments(self) -> dict[str, int]:
        """What a model has to know of the data."""

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of training step ``step`` (from 0) of the run with this seed: a function of its arguments alone.

        Targets are classes or tokens, int64, or the probabilities of each class as one more dimension, floating point. Fewer tokens
        than inputs are those after the last inputs.
        """

    def evaluation(self, split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order, each target once, in batches of at most ``size`` examples."""

    def scores(self, split: str, loss: float, accuracy: float) -> dict[str, float]:
        """The task's own metric on a split, by its name in run records, from the mean loss (nats) and the share of targets predicted."""

    def files(self) -> dict[str, str]:
        """Name -> content of what has to be kept with a run so that its model can be used: a tokenizer."""

    def identity(self) -> dict[str, Any]:
        """What the run record says about the data."""


@runtime_checkable
class Readable(Protocol):
    """Data whose targets are text."""

    def encode(self, text: str) -> Tensor:
        """A text as inputs, (n,) int64."""

    def decode(self, tokens: Tensor) -> str:
        """The text that inputs (n,) stand for."""


@runtime_checkable
class Skips(Protocol):
    """Data of which damaged examples are left out."""

    @property
    def skipped(self) -> Collection[str]:
        """What was left out so far, and why."""


class Source(Protocol):
    """Where a dataset comes from."""

    @property
    def title(self) -> str:
        """What the data truly is, for captions."""

    def key(self) -> str:
        """Changes whenever the content may have changed; names the cache."""

    def load(self, name: str, used: str, train: int | None, test: int | None, validation: int, progress: Progress | None = None) -> Dataset:
        """See ``mango.data.load``; a source may take further options of its kind of data."""


def identity_of(data: Dataset, digests: Iterable[str]) -> dict[str, str | int]:
    """Name, source and title of a dataset, one fingerprint for the digests of its splits, and the size of each split."""
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    counts = {name: len(split) for name, split in data.splits.items()}
    return {"name": data.name, "source": data.source, "title": data.title, "fingerprint": joined, **counts}


def derive(seed: int, stream: str, counter: int) -> int:
    """A 63-bit seed for the ``counter``-th use of a named stream; equal arguments give equal seeds, unequal ones unrelated seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{counter}".encode()).digest()[:8], "big") >> 1

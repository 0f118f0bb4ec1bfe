"""What the training loop asks of data, whatever they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mango.errors import ConfigError

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


def cut(
    whole: Tensor, share: int, unit: str, clip: bool, train: int | None = None, test: int | None = None, validation: int = 0
) -> dict[str, Tensor]:
    """The splits of rows that lie in the order train, validation, test.

    Args:
        whole: (n, ...).
        share: the last n / share rows are the test split.
        unit: what a row is, in the plural, for messages.
        clip: give what there is where more is asked for, as a stand-in does.
        train, test, validation: rows of each; None = all: the share for test, all before it and the validation for train. Fewer test rows
            are the first of the share, fewer training rows the last before validation.

    Returns: "train", "test" and, when asked for, "validation", as views.

    Raises: ConfigError when more is asked for than there is, or nothing is left to train on or to test.
    """
    held_out = len(whole) // share
    end = len(whole) - held_out
    if clip:
        validation, test = min(validation, end // share), min(test or held_out, held_out)
        train = min(train or end - validation, end - validation)
    train, test = end - validation if train is None else train, held_out if test is None else test
    if train < 1 or train + validation > end:
        raise ConfigError.of("data.train + data.validation", train + validation, f"at most the {end} {unit} before the test split")
    if not 1 <= test <= held_out:
        raise ConfigError.of("data.test", test, f"at most the {held_out} {unit} of the test split")
    splits = {"train": whole[end - validation - train : end - validation], "test": whole[end : end + test]}
    return splits | ({"validation": whole[end - validation : end]} if validation else {})


def derive(seed: int, stream: str, counter: int) -> int:
    """A 63-bit seed for the ``counter``-th use of a named stream; equal arguments give equal seeds, unequal ones unrelated seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{counter}".encode()).digest()[:8], "big") >> 1

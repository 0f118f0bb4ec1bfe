"""Image classification data in memory: balanced subsets, batches, augmentation; counter-based, so that step k is always the same batch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.compat import require
from mango.data.base import Progress, derive, identity_of
from mango.data.decode import Pixels, Record, cached
from mango.data.recipe import Recipe
from mango.data.sources import cache_root
from mango.errors import ConfigError, DataError

PLAIN = Recipe()
PAD = 4  # pixels of reflected border before a random crop, as is usual for CIFAR-10 (He et al., arXiv:1512.03385)


@dataclass(frozen=True)
class Split:
    """Images (n, height, width, 3) uint8 and labels (n,) int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """SHA-256 over the pixels, then the labels."""
        digest = hashlib.sha256(self.images.cpu().numpy().tobytes())
        digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageData:
    """A dataset for classification, ready to train on.

    Attributes:
        name, title, source: what was asked for, what it truly is (for captions), and "local", "download" or "embedded".
        splits: "train", "test" and, when asked for, "validation" (taken from the training images).
        classes: names of the classes.
        flip: whether mirrored images keep their class (not so for digits).
        mean, std: (3,) over the training subset, in units of 0..1.
        augment: whether training batches are cropped and, where ``flip`` allows, mirrored at random.
        recipe: what else is done to training batches.
        skipped: what was left out because it is damaged, and why.
        empty: classes without training images.
    """

    name: str
    title: str
    source: str
    splits: dict[str, Split]
    classes: list[str]
    flip: bool
    mean: Tensor
    std: Tensor
    augment: bool = True
    recipe: Recipe = PLAIN
    skipped: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    unit: str = field(default="images", init=False)

    @property
    def device(self) -> torch.device:
        return self.splits["train"].labels.device

    def to(self, device: torch.device) -> ImageData:
        splits = {name: Split(split.images.to(device), split.labels.to(device)) for name, split in self.splits.items()}
        return replace(self, splits=splits, mean=self.mean.to(device), std=self.std.to(device))

    def model_arguments(self) -> dict[str, int]:
        return {"classes": len(self.classes)}

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Epochs without replacement, the ragged rest of an epoch left out.

        Returns: inputs (size, 3, height, width) float32 in channels-last order; labels (size,), or the probabilities of ``Recipe.mix``.
        """
        train = self.splits["train"]
        epoch, position = divmod(step, len(train) // size)
        chosen = permutation(len(train), derive(seed, "epoch", epoch))[position * size : (position + 1) * size]
        chosen = chosen.to(self.device)
        images = self._augmented(train.images, chosen, derive(seed, "augment", step)) if self.augment else train.images[chosen]
        images = self.recipe.augment(images, derive(seed, "randaugment", step))
        return self.recipe.mix(self._normalised(images), train.labels[chosen], len(self.classes), derive(seed, "mixup", step))

    def evaluation(self, split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The split in order, in batches of at most ``size``, without augmentation."""
        data = self.splits[split]
        for start in range(0, len(data), size):
            yield self._normalised(data.images[start : start + size]), data.labels[start : start + size]

    def scores(self, split: str, loss: float, accuracy: float) -> dict[str, float]:
        """Accuracy."""
        return {"accuracy": accuracy}

    def files(self) -> dict[str, str]:
        return {}

    def identity(self) -> dict[str, Any]:
        found = identity_of(self, (split.fingerprint() for split in self.splits.values()))
        return found | {"corrupt": len(self.skipped), "empty": list(self.empty)}

    def _normalised(self, images: Tensor) -> Tensor:  # (b, height, width, 3) uint8 -> (b, 3, height, width) float32
        return ((images.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    def _augmented(self, images: Tensor, chosen: Tensor, seed: int) -> Tensor:
        """Random crop from the reflect-padded image and random mirror, as one gather over the whole batch."""
        batch, height, width = len(chosen), images.shape[1], images.shape[2]
        generator = torch.Generator().manual_seed(seed)
        offset = torch.randint(-PAD, PAD + 1, (2, batch, 1), generator=generator)
        mirror = torch.randint(0, 2, (batch, 1), generator=generator, dtype=torch.bool)
        rows = _reflect(torch.arange(height) + offset[0], height)  # (batch, height)
        columns = torch.arange(width).expand(batch, width)
        columns = torch.where(mirror, width - 1 - columns, columns) if self.flip else columns
        columns = _reflect(columns + offset[1], width)  # (batch, width)
        rows, columns = rows.to(images.device), columns.to(images.device)
        return images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


class ImageSource(ABC):
    """Images by their records: every image once.

    Attributes:
        folder: where in the cache the decoded images lie.
        flip: whether mirrored images keep their class.
        size: height and width in pixels.
        classes: names of the classes in order; None = the labels of the records.
        corrupt: "error" or "skip", what becomes of an image that cannot be decoded.
    """

    title: str
    folder = "cifar10"
    flip = True
    size = 32
    classes: list[str] | None = None
    corrupt = "error"

    @abstractmethod
    def key(self) -> str: ...

    @abstractmethod
    def records(self) -> Iterator[Record]: ...

    def load(
        self,
        name: str,
        used: str,
        train: int | None = None,
        test: int | None = None,
        validation: int = 0,
        progress: Progress | None = None,
        augment: bool = True,
        recipe: Recipe = PLAIN,
    ) -> ImageData:
        """Balanced subsets (see ``subset``). Raises: ConfigError, DataError."""
        decoder = require("PIL", extra="experiments", purpose="decoding images").__version__  # another decoder may give other pixels
        folder = cache_root() / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        key = f"{type(self).__name__.lower()}-{self.key()}-pillow{decoder}"
        pixels = cached(folder, key, self.records, self.size, progress, self.classes, self.corrupt)
        splits = subset(pixels, train, test, validation, clip=used == "embedded" and name != "digits")
        mean, std = statistics(splits["train"].images)
        classes, skipped = pixels["train"].classes, tuple(message for split in pixels.values() for message in split.damaged)
        present = set(pixels["train"].labels.tolist())
        empty = tuple(label for number, label in enumerate(classes) if number not in present)
        return ImageData(name, self.title, used, splits, classes, self.flip, mean, std, augment, recipe, skipped, empty)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices outside 0..size-1 mirrored at the border pixel, which is not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


@lru_cache(maxsize=2)
def permutation(size: int, seed: int) -> Tensor:
    """The order of an epoch."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def balanced_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """A fixed order of the images in which every prefix holds the classes as equally as they allow.

    Within a class the order is a fixed random one: position k of each class before position k + 1 of any.
    """
    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        rank[members] = np.arange(len(members))
    return np.lexsort((labels, rank))


def subset(pixels: dict[str, Pixels], train: int | None, test: int | None, validation: int, *, clip: bool) -> dict[str, Split]:
    """Balanced subsets of the decoded splits; validation images come from the training pool and are never trained on.

    Args:
        train, test: how many images; None = all.
        clip: take what there is when a stand-in holds fewer images than were asked for, instead of raising.

    Raises: ConfigError when more is asked for than there is.
    """
    pool, held_out = len(pixels["train"].labels), len(pixels["test"].labels)
    if clip:
        validation = min(validation, pool // 5)
        train, test = min(train or pool, pool - validation), min(test or held_out, held_out)
    train, test = pool - validation if train is None else train, held_out if test is None else test
    if train + validation > pool or train < 1:
        raise ConfigError.of(
            "data.train + data.validation",
            train + validation,
            f"at most the {pool} training images of this dataset, at least 1 of them for training",
        )
    if test > held_out:
        raise ConfigError.of("data.test", test, f"at most the {held_out} test images of this dataset")
    order = balanced_order(pixels["train"].labels)
    chosen = {"train": order[validation : validation + train], "test": balanced_order(pixels["test"].labels)[:test]}
    if validation:
        chosen["validation"] = order[:validation]
    return {name: _gather(pixels["test" if name == "test" else "train"], np.sort(index)) for name, index in chosen.items()}


def _gather(pixels: Pixels, index: NDArray[np.int64]) -> Split:
    images = np.ascontiguousarray(pixels.images[pixels.position[index]])
    return Split(torch.from_numpy(images), torch.from_numpy(pixels.labels[index].copy()))


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel over all pixels, (3,) each, in units of 0..1, from exact integer histograms."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = torch.empty(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    for channel in range(3):
        share = torch.bincount(images[..., channel].flatten(), minlength=256).double()
        share /= share.sum()
        mean[channel] = share @ values
        std[channel] = (share @ (values - mean[channel]) ** 2).sqrt()
    if (std == 0).any():
        raise DataError("every training image has the same colour: there is nothing to normalise")
    return mean.float(), std.float()

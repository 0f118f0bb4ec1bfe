"""Images too many to keep decoded: each is decoded when a batch asks for it, by worker processes that run ahead."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mango.compat import transforms
from mango.data.base import derive, identity_of
from mango.data.decode import damage, decode_image, open_image
from mango.data.images import balanced_order, permutation
from mango.data.recipe import Recipe
from mango.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mango.data.imagefolder import Item, _Part

# Of ImageNet's training images, as everyone uses them; exact statistics would take a pass over the data.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DAMAGE = (OSError, SyntaxError, ValueError, DataError)
Batch = tuple[Tensor, Tensor, list[str]]  # images, their labels, what was damaged


@dataclass(frozen=True)
class Files:
    """The images of a split that are to be decoded; labels are int64, (n,)."""

    items: list[Item]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """SHA-256 over names and sizes: reading everything would take as long as an epoch."""
        digest = hashlib.sha256()
        for item, label in zip(self.items, self.labels.tolist(), strict=True):
            digest.update(f"{label}/{item.name}:{item.size}\n".encode())
        return digest.hexdigest()

    def decoded(self, place: int, decode: Any, corrupt: str) -> tuple[Any, int, list[str]]:
        """``decode(bytes)`` of one image; of the next whole one when it is damaged and may be skipped. Raises: DataError."""
        failures: list[str] = []
        for offset in range(len(self)):
            chosen = (place + offset) % len(self)
            item = self.items[chosen]
            try:
                return decode(item.read()), chosen, failures
            except DAMAGE as error:
                failures.append(damage(item.origin, error))
            if corrupt == "error":
                raise DataError(failures[0])
        raise DataError(f"no image of a split can be decoded: {failures[0]}")


@dataclass(frozen=True)
class StreamedData:
    """As ``mango.data.images.ImageData``, decoded on demand. Training images are random crops of 8 to 100 % of the area
    (Szegedy et al., arXiv:1409.4842), mirrored at random; test images the middle square.

    Attributes:
        size: height and width in pixels.
        corrupt: "error", or "skip": the next whole image takes the place of a damaged one.
        workers: processes that decode ahead; 0 = none. Batches do not depend on it.
        device: where batches are wanted; None = on the CPU.
    """

    name: str
    title: str
    source: str
    splits: dict[str, Files]
    classes: list[str]
    size: int
    corrupt: str
    empty: tuple[str, ...]
    augment: bool
    recipe: Recipe
    workers: int
    device: torch.device | None = None
    skipped: set[str] = field(default_factory=set)
    ahead: dict[str, Any] = field(default_factory=dict, repr=False)  # the stream of batches that is open, and where it is
    unit: str = field(default="images", init=False)

    def to(self, device: torch.device) -> StreamedData:
        return replace(self, device=device)

    def model_arguments(self) -> dict[str, int]:
        return {"classes": len(self.classes)}

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """As for images in memory. Asking for step after step keeps the workers busy; any other order is right, and slower."""
        if self.ahead.get("next") != (step, size, seed):
            self.ahead["stream"] = self._stream(_Steps(self, size, seed), step)
        images, labels, failures = next(self.ahead["stream"])
        self.ahead["next"] = (step + 1, size, seed)
        self._note(failures)
        return self.recipe.mix(self._normalised(images), labels.to(self.device), len(self.classes), derive(seed, "mixup", step))

    def evaluation(self, split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, failures in self._stream(_InOrder(self.splits[split], self.size, size, self.corrupt), 0):
            self._note(failures)
            if len(labels):
                yield self._normalised(images), labels.to(self.device)

    def scores(self, split: str, loss: float, accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy}

    def files(self) -> dict[str, str]:
        return {}

    def identity(self) -> dict[str, Any]:
        return identity_of(self, (files.fingerprint() for files in self.splits.values())) | {
            "corrupt": len(self.skipped),
            "empty": list(self.empty),
        }

    def _stream(self, batches: Dataset[Batch], start: int) -> Iterator[Batch]:
        """Batches from number ``start`` on, in order."""
        count = len(batches)  # type: ignore[arg-type]
        pinned = self.device is not None and self.device.type == "cuda"
        return iter(DataLoader(batches, batch_size=None, sampler=range(start, count), num_workers=self.workers, pin_memory=pinned))

    def _normalised(self, images: Tensor) -> Tensor:  # (b, height, width, 3) uint8 -> (b, 3, height, width) float32
        images = images.to(self.device, non_blocking=True).float() / 255
        mean, std = (torch.tensor(values, device=self.device) for values in (MEAN, STD))
        return ((images - mean) / std).permute(0, 3, 1, 2)

    def _note(self, failures: list[str]) -> None:
        for message in set(failures) - self.skipped:
            warnings.warn(f"skipped: {message}", stacklevel=3)
        self.skipped.update(failures)


class _Steps(Dataset[Batch]):
    """Training batches by the number of their step."""

    def __init__(self, data: StreamedData, size: int, seed: int) -> None:
        self.files, self.pixels, self.corrupt, self.recipe, self.augment = (
            data.splits["train"], data.size, data.corrupt, data.recipe, data.augment,
        )  # fmt: skip
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return 1 << 62  # the caller stops

    def __getitem__(self, step: int) -> Batch:
        epoch, position = divmod(step, len(self.files) // self.size)
        order = permutation(len(self.files), derive(self.seed, "epoch", epoch))
        chosen = order[position * self.size : (position + 1) * self.size].tolist()
        v2 = transforms("random crops")
        crop = v2.Compose([v2.RandomResizedCrop(self.pixels, antialias=True), v2.RandomHorizontalFlip()])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator of the CPU
            torch.manual_seed(derive(self.seed, "augment", step))
            decode = (lambda data: np.array(crop(open_image(data)))) if self.augment else (lambda data: decode_image(data, self.pixels))
            images, labels, failures = _gather(self.files, chosen, decode, self.corrupt)
        return self.recipe.augment(images, derive(self.seed, "randaugment", step)), labels, failures


class _InOrder(Dataset[Batch]):
    """A split in order, as batches."""

    def __init__(self, files: Files, pixels: int, size: int, corrupt: str) -> None:
        self.files, self.pixels, self.size, self.corrupt = files, pixels, size, corrupt

    def __len__(self) -> int:
        return -(-len(self.files) // self.size)

    def __getitem__(self, number: int) -> Batch:
        """Without what is damaged, where that may be skipped: nothing takes its place."""
        images, labels, failures = [], [], []
        for place in range(number * self.size, min((number + 1) * self.size, len(self.files))):
            image, taken, damaged = self.files.decoded(place, lambda data: decode_image(data, self.pixels), self.corrupt)
            failures += damaged
            if taken == place:
                images.append(torch.from_numpy(np.array(image)))
                labels.append(self.files.labels[place])
        empty = torch.empty(0, self.pixels, self.pixels, 3, dtype=torch.uint8)
        return torch.stack(images) if images else empty, torch.stack(labels) if labels else torch.empty(0, dtype=torch.int64), failures


def _gather(files: Files, chosen: list[int], decode: Any, corrupt: str) -> Batch:
    found = [files.decoded(place, decode, corrupt) for place in chosen]
    images = torch.stack([torch.from_numpy(np.array(image)) for image, _, _ in found])
    labels = files.labels[torch.tensor([place for _, place, _ in found])]
    return images, labels, [message for _, _, failures in found for message in failures]


def streamed(
    part: _Part,
    name: str,
    used: str,
    train: int | None,
    test: int | None,
    validation: int,
    *,
    augment: bool,
    recipe: Recipe,
    workers: int,
) -> StreamedData:
    """Balanced subsets as for images in memory. Raises: ConfigError when more is asked for than there is; DataError for a damaged shard."""
    classes = part.classes or []
    number = {label: index for index, label in enumerate(classes)}
    items, skipped = part.items(), set()
    for item in items:
        if item.damage is not None and part.corrupt == "error":
            raise DataError(item.damage)
        skipped |= {item.damage} if item.damage is not None else set()
    whole = sorted((item for item in items if item.damage is None), key=lambda item: (number[item.label], item.name))
    pools = {split: [item for item in whole if item.split == split] for split in ("train", "test")}
    splits = {}
    counts = {split: len(pool) for split, pool in pools.items()}
    train, test = counts["train"] - validation if train is None else train, counts["test"] if test is None else test
    if not 1 <= train <= counts["train"] - validation:
        raise ConfigError.of(
            "data.train + data.validation", train + validation, f"at most the {counts['train']} training images, at least 1"
        )
    if test > counts["test"]:
        raise ConfigError.of("data.test", test, f"at most the {counts['test']} test images of this dataset")
    for split, pool, first, count in (
        ("train", "train", validation, train),
        ("test", "test", 0, test),
        ("validation", "train", 0, validation),
    ):
        labels = np.array([number[item.label] for item in pools[pool]], np.int64)
        index = np.sort(balanced_order(labels)[first : first + count])
        if count:
            splits[split] = Files([pools[pool][place] for place in index], torch.from_numpy(labels[index]))
    present = {item.label for item in pools["train"]}
    empty = tuple(label for label in classes if label not in present)
    return StreamedData(name, part.title, used, splits, classes, part.size, part.corrupt, empty, augment, recipe, workers, skipped=skipped)

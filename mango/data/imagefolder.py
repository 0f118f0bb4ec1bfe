"""Images in classes on disk: folders as torchvision's ImageFolder reads them, or tar shards as webdataset does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mango.data.base import Progress
from mango.data.decode import Record
from mango.data.images import ImageData, ImageSource
from mango.data.photographs import photographs
from mango.data.recipe import Recipe
from mango.data.sources import cache_root, data_root, locked, verify
from mango.data.streamed import StreamedData, streamed
from mango.errors import ConfigError, DataError

ARCHIVE = "tiny-imagenet-100.tar.xz"
ARCHIVE_SHA256 = "b1feaba37e50b08bfb3f6b89a7dc0a0b43f9ce5a8f6d9e45380adc5dbacc2fbb"
SPLITS = {"train": ("train",), "test": ("val", "test", "validation")}  # folders of each split, the first that is there
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
LEGAL = "<root>/{train,val|test}/<class>/**/*.jpg|png|... or <root>/{train,val|test}/NNNN.tar of <key>.jpg + <key>.cls or <key>.json"


@dataclass(frozen=True, slots=True)
class Item:
    """One image that has not been read yet.

    Attributes:
        split, label, name: as for ``mango.data.decode.Record``.
        path: the file that holds it.
        offset, size: where in the file, in bytes; size -1 = to its end.
        damage: why it cannot be read, when its shard is not whole.
    """

    split: str
    label: str
    name: str
    path: str
    offset: int = 0
    size: int = -1
    damage: str | None = None

    @property
    def origin(self) -> str:
        """What to name when it cannot be decoded."""
        return self.path if self.size < 0 else f"{self.path}:{self.name}"

    def read(self) -> bytes:
        """Its encoded bytes. Raises: DataError naming it."""
        if self.damage is not None:
            raise DataError(self.damage)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.origin} cannot be read: {error.strerror or error}") from error

    def record(self) -> Record:
        try:
            return Record(self.split, self.label, self.name, self.read(), self.origin)
        except DataError as error:
            return Record(self.split, self.label, self.name, error, self.origin)


class Tree(ImageSource):
    """``<root>/{train,val|test}`` as class folders or as shards.

    Args:
        title: for captions.
        path: where the data are, for listings: the root itself, or what it is made from; None = the package.
        make: gives the root, when it is first needed.
    """

    folder = "imagefolder"

    def __init__(self, title: str, path: Path | None, make: Callable[[], Path] | None = None) -> None:
        self.title, self.path, self._make = title, path or "", make

    @cached_property
    def root(self) -> Path:
        """The folder of the splits."""
        return Path(self.path) if self._make is None else self._make()

    def key(self) -> str:
        """Changes when a file is added, removed, resized or touched."""
        listing = hashlib.sha256(str(self.root.resolve()).encode())
        for split in SPLITS:
            for path in sorted(_walk(self._place(split))):
                stat = os.stat(path)
                listing.update(f"{path}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
        return listing.hexdigest()[:16]

    def records(self) -> Iterator[Record]:
        return (item.record() for item in self.items)

    @cached_property
    def items(self) -> list[Item]:
        """Every image, train before test, in order of class and name. Raises: DataError when a split holds none."""
        found = []
        for split in SPLITS:
            place = self._place(split)
            shards = sorted(place.glob("*.tar"))
            images = list(_shards(split, shards) if shards else _folders(split, place))
            if not images:
                raise DataError(f"{place} holds no images: expected {LEGAL}")
            found += images
        return found

    @cached_property
    def labels(self) -> list[str]:
        """Names of the classes, those without images included: folders by name, as torchvision numbers them; shards by number."""
        folders = {entry.name for split in SPLITS for entry in os.scandir(self._place(split)) if entry.is_dir()}
        if not any(self._place("train").glob("*.tar")):
            return sorted(folders)
        labels = {item.label for item in self.items if item.damage is None}
        return sorted(labels, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label))

    def _place(self, split: str) -> Path:
        for name in SPLITS[split]:
            if (self.root / name).is_dir():
                return self.root / name
        raise DataError(f"{self.root / SPLITS[split][0]} is missing: expected {LEGAL}")

    def load(  # type: ignore[override]
        self,
        name: str,
        used: str,
        train: int | None = None,
        test: int | None = None,
        validation: int = 0,
        progress: Progress | None = None,
        *,
        size: int = 64,
        classes: int | None = None,
        corrupt: str = "error",
        empty: str = "warn",
        decode: str = "once",
        workers: int = 0,
        augment: bool = True,
        **recipe: Any,
    ) -> ImageData | StreamedData:
        """Balanced subsets of the first ``classes`` classes, ``size`` pixels on a side: see ``mango.training.task.ImageFolder``.

        Raises: ConfigError, DataError naming what is damaged.
        """
        labels = self.labels[:classes]
        if classes is not None and classes > len(self.labels) and used != "embedded":  # a stand-in gives what it has
            raise ConfigError.of("data.classes", classes, f"at most the {len(self.labels)} classes of this dataset, or null for all")
        part = _Part(self, labels, size, corrupt)
        counts = (name, used, train, test, validation)
        if decode == "streamed":
            data: ImageData | StreamedData = streamed(part, *counts, augment=augment, recipe=Recipe(**recipe), workers=workers)
        else:
            data = ImageSource.load(part, *counts, progress, augment=augment, recipe=Recipe(**recipe))
        if data.empty and empty == "error":
            raise DataError(f"{self.root}: no training images of class {', '.join(data.empty)}: data.empty = warn goes on without")
        for label in data.empty:
            warnings.warn(f"{self.root}: class {label} has no training images", stacklevel=2)
        for message in data.skipped:
            warnings.warn(f"skipped: {message}", stacklevel=2)
        return data


class _Part(ImageSource):
    """Some classes of a tree at one size."""

    folder = Tree.folder
    classes: list[str]

    def __init__(self, tree: Tree, classes: list[str], size: int, corrupt: str) -> None:
        self.tree, self.classes, self.size, self.corrupt, self.title = tree, classes, size, corrupt, tree.title

    def key(self) -> str:
        chosen = hashlib.sha256("\n".join(self.classes).encode()).hexdigest()[:8]
        return f"{self.tree.key()}-{chosen}-{self.size}"

    def items(self) -> list[Item]:
        """Those of the chosen classes, and what is damaged beyond knowing its class."""
        chosen = set(self.classes)
        return [item for item in self.tree.items if item.label in chosen or item.damage is not None]

    def records(self) -> Iterator[Record]:
        return (item.record() for item in self.items())


def _walk(place: Path) -> Iterator[str]:
    for folder, _, names in os.walk(place, followlinks=True):
        yield from (os.path.join(folder, name) for name in names)


def _folders(split: str, place: Path) -> Iterator[Item]:
    for label in sorted(entry.name for entry in os.scandir(place) if entry.is_dir()):
        for path in sorted(_walk(place / label)):
            if path.lower().endswith(SUFFIXES):
                yield Item(split, label, os.path.relpath(path, place / label), path)


def _shards(split: str, shards: list[Path]) -> Iterator[Item]:
    """Images of the shards and the labels that lie beside them; a shard that is not whole gives what comes before the damage."""
    for shard in shards:
        images: dict[str, tuple[str, int, int]] = {}  # key -> name, offset, size
        labels: dict[str, str] = {}
        problem = None
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    key, _, kind = member.name.rpartition(".")
                    if member.isfile() and kind.lower() in ("cls", "json"):
                        content = archive.extractfile(member).read().decode().strip()  # type: ignore[union-attr]
                        labels[key] = _label(content) if kind.lower() == "json" else content
                    elif member.isfile() and f".{kind.lower()}" in SUFFIXES:
                        images[key] = (member.name, member.offset_data, member.size)
        except (tarfile.TarError, OSError, EOFError, ValueError, KeyError) as error:
            problem = f"{shard} is not a whole shard: {error}"
        for key, (name, offset, size) in images.items():
            if key in labels:
                yield Item(split, labels[key], f"{shard.name}/{name}", str(shard), offset, size)
            elif problem is None:
                yield Item(split, "", name, str(shard), damage=f"{shard}:{name} has no {key}.cls or {key}.json beside it")
        if problem is not None:
            yield Item(split, "", "", str(shard), damage=problem)


def _label(content: str) -> str:
    """The class in a JSON file: a bare value, or the field cls, label or class. Raises: KeyError, ValueError."""
    value = json.loads(content)
    if not isinstance(value, dict):
        return str(value)
    field = next((field for field in ("cls", "label", "class") if field in value), "cls")
    return str(value[field])


def find(source: str, root: str | None = None) -> tuple[str, Tree]:
    """See ``mango.data.find``. Without ``root``: ``imagefolder`` in the data folder, then Tiny-ImageNet-100 there, then photographs."""
    if source == "download":
        raise ConfigError.of("data.source", source, "auto, local or embedded: ImageNet cannot be downloaded without an account")
    if root is not None:
        if source == "embedded" or not Path(root).is_dir():
            raise ConfigError.of("data.root", root, f"null for embedded data, otherwise an existing folder: {LEGAL}")
        return "local", Tree(Path(root).resolve().name, Path(root))
    place = data_root() if source != "embedded" else None
    if place is not None and (place / "imagefolder").is_dir():
        return "local", Tree("imagefolder", place / "imagefolder")
    if place is not None and (place / "tiny-imagenet-100").is_dir():
        return "local", Tree("Tiny-ImageNet-100", place / "tiny-imagenet-100")
    if place is not None and (place / ARCHIVE).is_file():
        archive = place / ARCHIVE
        return "local", Tree("Tiny-ImageNet-100", archive, lambda: unpacked(archive, ARCHIVE_SHA256))
    if source == "local":
        raise DataError(f"data.source = 'local' but there are no images: expected imagefolder/, tiny-imagenet-100/ or {ARCHIVE} in {place}")
    return "embedded", Tree("patches of photographs (embedded stand-in)", None, photographs)


def unpacked(archive: Path, expected: str) -> Path:
    """The one folder of an archive whose checksum is known, unpacked into the cache once. Raises: DataError when it is damaged."""
    target = cache_root() / "unpacked" / expected[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock")):
        if not target.is_dir():
            verify(archive, expected)
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process: we hold the lock
            with tarfile.open(archive) as file:
                file.extractall(partial, filter="data")
            partial.rename(target)
    return next(target.iterdir())

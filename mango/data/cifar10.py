"""CIFAR-10 from class folders of images, from the archive of such folders, or from ``cifar-10-batches-py`` (Krizhevsky 2009)."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mango.compat import torchvision
from mango.data.decode import Record
from mango.data.embedded import Digits
from mango.data.images import ImageSource
from mango.data.sources import cache_root, data_root, verify
from mango.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE = "cifar10-jpeg.tar.xz"
ARCHIVE_SHA256 = "52cd67fe24745f35b465e8ffaf7bec9d9b9501228039b9db6e02351e89da2e42"
LEGAL = f"cifar10/{{train,test}}/<class>/*.jpg|png, {ARCHIVE} or cifar-10-batches-py/"
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Folders(ImageSource):
    """``<root>/{train,test}/<class>/*.jpg|png``."""

    root: Path
    title = "CIFAR-10"

    def key(self) -> str:
        """Changes when a file is added, removed, resized or touched."""
        listing = hashlib.sha256(str(self.root.resolve()).encode())
        for split, label, entry in self._files():
            stat = entry.stat()
            listing.update(f"{split}/{label}/{entry.name}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
        return listing.hexdigest()[:16]

    def records(self) -> Iterator[Record]:
        for split, label, entry in self._files():
            yield Record(split, label, entry.name, Path(entry.path).read_bytes(), entry.path)

    def _files(self) -> Iterator[tuple[str, str, os.DirEntry[str]]]:
        for split in ("train", "test"):
            if not (self.root / split).is_dir():
                raise DataError(f"{self.root / split} is missing: expected {LEGAL}")
            empty = True
            for label in sorted(entry.name for entry in os.scandir(self.root / split) if entry.is_dir()):
                for entry in sorted(os.scandir(self.root / split / label), key=lambda entry: entry.name):
                    if entry.name.lower().endswith(SUFFIXES):
                        empty = False
                        yield split, label, entry
            if empty:
                raise DataError(f"{self.root / split} holds no images: expected {LEGAL}")


@dataclass(frozen=True)
class Archive(ImageSource):
    """The same folders in one tar archive, whose SHA-256 is known."""

    path: Path
    title = "CIFAR-10 (JPEG)"

    def key(self) -> str:
        return verify(self.path, ARCHIVE_SHA256)[:16]

    def records(self) -> Iterator[Record]:
        with tarfile.open(self.path) as archive:
            for member in archive:
                parts = member.name.split("/")
                stream = archive.extractfile(member) if member.isfile() and member.name.lower().endswith(SUFFIXES) else None
                if stream is not None:
                    yield Record(parts[-3], parts[-2], parts[-1], stream.read(), f"{self.path}:{member.name}")


@dataclass(frozen=True)
class Batches(ImageSource):
    """``cifar-10-batches-py``: five pickled training batches and one test batch."""

    root: Path
    title = "CIFAR-10"

    def key(self) -> str:
        listing = hashlib.sha256()
        for _, path in self._files():
            stat = path.stat()
            listing.update(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
        return listing.hexdigest()[:16]

    def records(self) -> Iterator[Record]:
        for split, path in self._files():
            try:
                batch = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
                pixels = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (n, 32, 32, 3)
                labels = [CLASSES[label] for label in batch[b"labels"]]
            except (pickle.UnpicklingError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                raise DataError(f"{path} is not a whole CIFAR-10 batch: {error}") from error
            for number, (label, image) in enumerate(zip(labels, pixels, strict=True)):
                yield Record(split, label, f"{path.name}:{number:05d}", image, str(path))

    def _files(self) -> list[tuple[str, Path]]:
        files = [("train", self.root / f"data_batch_{number}") for number in range(1, 6)] + [("test", self.root / "test_batch")]
        for _, path in files:
            if not path.is_file():
                raise DataError(f"{path} is missing: expected data_batch_1 to data_batch_5 and test_batch")
        return files


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays and plain containers only: a pickle may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 2 strings in old pickles are restored
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def find(source: str) -> tuple[str, ImageSource]:
    """See ``mango.data.find``."""
    if source == "embedded":
        return "embedded", Digits()
    if source == "download":
        return "download", download()
    root = data_root()
    found = local(root) if root is not None else None
    if found is not None:
        return "local", found
    if source == "local":
        place = f"nothing of it in {root}" if root is not None else "there is no data folder (set MANGO_DATA)"
        raise DataError(f"data.source = 'local' but cifar10 was not found: {place}; expected {LEGAL}")
    return "embedded", Digits()


def local(root: Path) -> Folders | Archive | Batches | None:
    """The copy under ``root``, or None."""
    if (root / "cifar10").is_dir():
        return Folders(root / "cifar10")
    if (root / "cifar-10-batches-py").is_dir():
        return Batches(root / "cifar-10-batches-py")
    return Archive(root / ARCHIVE) if (root / ARCHIVE).is_file() else None


def download() -> Batches:
    """torchvision's download (170 MB), kept in the cache. Raises: DataError when there is no network."""
    folder = cache_root() / "download"
    if not (folder / "cifar-10-batches-py").is_dir():
        try:
            torchvision("downloading CIFAR-10").datasets.CIFAR10(str(folder), download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"the download of CIFAR-10 failed: {error}") from error
    return Batches(folder / "cifar-10-batches-py")

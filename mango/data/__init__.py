"""Datasets: found locally, downloaded when asked, or embedded. ``mango.data.load("cifar10", source="auto", train=8000, test=2000)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from mango.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mango.data.decode import Record
    from mango.data.images import ImageData

SOURCES = ("auto", "local", "download", "embedded")
NAMES = {
    "cifar10": "60 000 colour photographs of 10 classes, 32x32 (Krizhevsky 2009)",
    "digits": "1 797 handwritten digits of scikit-learn, enlarged to 32x32: the embedded stand-in",
}


class Source(Protocol):
    """Where a dataset's images come from."""

    @property
    def title(self) -> str:
        """What the data truly is, for captions."""

    def key(self) -> str:
        """Changes whenever the content may have changed; names the decoded cache."""

    def records(self) -> Iterator[Record]:
        """Every image once."""


def find(name: str, source: str) -> tuple[str, Source]:
    """Where dataset ``name`` is taken from: ("local" | "download" | "embedded", its source).

    "auto" is local when there is a local copy, else embedded; only "download" touches the network.

    Raises: ConfigError for an unknown name or source; DataError when source is "local" and there is no copy, or the copy is damaged.
    """
    from mango.data import cifar10
    from mango.data.embedded import Digits
    from mango.data.sources import data_root

    if name not in NAMES:
        raise ConfigError.of("data.name", name, "one of " + ", ".join(NAMES))
    if source not in SOURCES:
        raise ConfigError.of("data.source", source, "one of " + ", ".join(SOURCES))
    if name == "digits" or source == "embedded":
        if source in ("local", "download"):
            raise ConfigError.of("data.source", source, "auto or embedded, the digits ship with scikit-learn")
        return "embedded", Digits()
    if source == "download":
        return "download", cifar10.download()
    root = data_root()
    found = cifar10.local(root) if root is not None else None
    if found is not None:
        return "local", found
    if source == "local":
        place = f"nothing of it in {root}" if root is not None else "there is no data folder (set MANGO_DATA)"
        raise DataError(f"data.source = 'local' but cifar10 was not found: {place}; expected {cifar10.LEGAL}")
    return "embedded", Digits()


def load(
    name: str,
    source: str = "auto",
    train: int | None = None,
    test: int | None = None,
    validation: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ImageData:
    """A dataset in memory, decoded on first use into the cache and read from there afterwards.

    Args:
        name: a key of ``NAMES``.
        source: one of ``SOURCES``; see ``find``.
        train, test, validation: how many images of each, class-balanced and always the same ones; None = all.
            Validation images are taken from the training images. An embedded stand-in with fewer images gives all it has.
        progress: called with the number of images decoded so far.

    Raises: ConfigError, DataError.
    """
    from mango.compat import require
    from mango.data.decode import cached
    from mango.data.images import ImageData, statistics, subset
    from mango.data.sources import cache_root

    used, origin = find(name, source)
    decoder = require("PIL", extra="experiments", purpose="decoding images").__version__  # another decoder may give other pixels
    key = f"{type(origin).__name__.lower()}-{origin.key()}-pillow{decoder}"
    folder = cache_root() / ("digits" if used == "embedded" else name)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = cached(folder, key, origin.records, 32, progress)
    splits = subset(pixels, train, test, validation, clip=used == "embedded" and name != "digits")
    mean, std = statistics(splits["train"].images)
    return ImageData(name, origin.title, used, splits, pixels["train"].classes, used != "embedded", mean, std)


__all__ = ["NAMES", "SOURCES", "Source", "find", "load"]

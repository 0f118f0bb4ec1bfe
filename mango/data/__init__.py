"""Datasets: found locally, downloaded when asked, or embedded. ``mango.data.load("cifar10", source="auto", train=8000, test=2000)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mango.errors import ConfigError
from mango.registry import Registry

if TYPE_CHECKING:
    from mango.data.base import Dataset, Progress, Source

SOURCES = ("auto", "local", "download", "embedded")
NAMES = {
    "cifar10": "60 000 colour photographs of 10 classes, 32x32 (Krizhevsky 2009)",
    "digits": "1 797 handwritten digits of scikit-learn, enlarged to 32x32: the embedded stand-in for images",
    "imagefolder": "images in class folders or tar shards; Tiny-ImageNet-100; embedded stand-in: patches of scikit-image's photographs",
    "text": "English: news, addresses and WikiText-2; embedded stand-in: Python's documentation",
    "fineweb-edu": "web pages in parquet shards, column `text`; embedded stand-in: Python's documentation",
    "c4": "web pages in shards of gzipped JSON lines, field `text`; embedded stand-in: Python's documentation",
    "movie-reviews": "2 000 reviews, a domain to fine-tune on (Pang and Lee 2004); embedded stand-in: Python's code",
    "movie-sentiment": "the same reviews with their verdicts, to predict; embedded stand-in: Python's documentation or its code",
}
REGISTRY = Registry(
    "data.name",
    {
        "cifar10": "mango.data.cifar10:find",
        "digits": "mango.data.embedded:find",
        "imagefolder": "mango.data.imagefolder:find",
        "text": "mango.data.text:find",
        "fineweb-edu": "mango.data.shards:find",
        "c4": "mango.data.shards:find_c4",
        "movie-reviews": "mango.data.reviews:find",
        "movie-sentiment": "mango.data.sentiment:find",
    },
)


def find(name: str, source: str, root: str | None = None) -> tuple[str, Source]:
    """Where dataset ``name`` is taken from: ("local" | "download" | "embedded", its source).

    "auto" is local when there is a local copy, else embedded; only "download" touches the network. Data of one's own lie at ``root``.

    Raises: ConfigError for an unknown name or source; DataError when source is "local" and there is no copy, or the copy is damaged.
    """
    finder = REGISTRY.load(name)
    if source not in SOURCES:
        raise ConfigError.of("data.source", source, "one of " + ", ".join(SOURCES))
    return finder(source) if root is None else finder(source, root)


def load(
    name: str,
    source: str = "auto",
    train: int | None = None,
    test: int | None = None,
    validation: int = 0,
    progress: Progress | None = None,
    root: str | None = None,
    **options: Any,
) -> Dataset:
    """A dataset ready to train on; decoded or unpacked on first use into the cache and read from there afterwards.

    Args:
        name: a key of ``NAMES``.
        source: one of ``SOURCES``; see ``find``.
        train, test, validation: how many images, bytes or reviews of each, always the same ones; None = all. Validation is taken from
            what would be trained on. An embedded stand-in that holds less gives all it has.
        progress: called with the number of images decoded so far.
        root: the folder of an ``imagefolder``; None = the data folder's.
        options: of this kind of data: ``augment`` for images, ``sequence``, ``vocabulary`` and ``tokenizer`` for text.

    Raises: ConfigError, DataError.
    """
    used, origin = find(name, source, root)
    return origin.load(name, used, train, test, validation, progress, **options)


__all__ = ["NAMES", "REGISTRY", "SOURCES", "find", "load"]

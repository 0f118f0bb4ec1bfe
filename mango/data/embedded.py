"""Data that needs neither files nor network. It stands in for a dataset and says so in its title."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from mango.compat import require
from mango.data.decode import Record
from mango.data.images import ImageSource
from mango.errors import ConfigError, MissingExtra

TEST_EVERY = 5  # every fifth image of a class is a test image


class Digits(ImageSource):
    """scikit-learn's 1 797 handwritten digits (UCI "Optical Recognition of Handwritten Digits"), 8x8, enlarged to 32x32x3.

    Each pixel becomes a block of 4x4 (nearest neighbour), so that models for 32x32 images run unchanged.
    """

    title = "digits (embedded stand-in)"
    folder = "digits"
    flip = False

    def key(self) -> str:
        try:
            return version("scikit-learn")  # not imported: that takes seconds, and once decoded the digits are read from the cache
        except PackageNotFoundError as error:
            raise MissingExtra.of("scikit-learn", "experiments", "the embedded digits") from error

    def records(self) -> Iterator[Record]:
        digits = require("sklearn.datasets", extra="experiments", purpose="the embedded digits").load_digits()
        seen = dict.fromkeys(range(10), 0)
        grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), values 0..16
        for number, (image, label) in enumerate(zip(grey, digits.target, strict=True)):
            seen[int(label)] += 1
            pixels = np.repeat(image.repeat(4, axis=0).repeat(4, axis=1)[:, :, None], 3, axis=2)  # (32, 32, 3)
            yield Record(
                "test" if seen[int(label)] % TEST_EVERY == 0 else "train", str(label), f"{number:04d}", pixels, "scikit-learn digits"
            )


def find(source: str) -> tuple[str, Digits]:
    """See ``mango.data.find``."""
    if source in ("local", "download"):
        raise ConfigError.of("data.source", source, "auto or embedded, the digits ship with scikit-learn")
    return "embedded", Digits()

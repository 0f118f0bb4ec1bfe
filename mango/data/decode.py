"""From image files to one memory-mapped array of bytes, made once.

A source yields records; encoded images are decoded by two processes; pixels are appended to a file in a temporary folder that is renamed
when it is complete, so that a killed process leaves nothing that could be taken for a cache. A damaged image is never part of a dataset: it
is an error, or left out and named, as the caller says.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mango.compat import require
from mango.data.sources import locked
from mango.errors import DataError

CHUNK = 256  # images per task: large enough that sending them costs little beside decoding
WORKERS = 2
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # no others: Pillow's rarer readers are seldom looked after
PNG_END = b"IEND\xaeB`\x82"  # Pillow accepts a PNG that lacks its last chunk; we do not


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a dataset.

    Attributes:
        split: "train" or "test".
        label: name of its class.
        name: a name that is unique within the split and class and gives the order.
        data: encoded bytes, pixels of shape (size, size, 3), uint8, or the error that reading it gave.
        origin: the file to name when it cannot be decoded.
    """

    split: str
    label: str
    name: str
    data: bytes | NDArray[np.uint8] | DataError
    origin: str


@dataclass(frozen=True)
class Pixels:
    """One split of a decoded dataset, in the order of class and name.

    Attributes:
        images: memory map, (n, size, size, 3) uint8, in the order in which the source gave them.
        position: (n,) int64, where the i-th image lies in ``images``.
        labels: (n,) int64, class of the i-th image.
        classes: names of the classes.
        damaged: what could not be decoded, and why; left out of ``images``.
    """

    images: NDArray[np.uint8]
    position: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: list[str]
    damaged: list[str] = field(default_factory=list)


def cached(
    folder: Path,
    key: str,
    records: Callable[[], Iterable[Record]],
    size: int,
    progress: Callable[[int], None] | None,
    classes: list[str] | None = None,
    corrupt: str = "error",
) -> dict[str, Pixels]:
    """The decoded dataset ``key``, built from ``records()`` when the cache under ``folder`` lacks it.

    Args:
        size: height and width in pixels; of other images the middle square is resized (bilinear, antialiased).
        progress: called with the number of images decoded so far.
        classes: their names in order, those without images included; None = the sorted labels of the records.
        corrupt: "error" or "skip", what becomes of an image that cannot be decoded.

    Raises: DataError naming the file that cannot be decoded.
    """
    target = folder / key
    if not (target / "meta.json").is_file():
        with locked(folder / f"{key}.lock"):
            if not (target / "meta.json").is_file():
                partial = folder / f"{key}.partial"
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed process: we hold the lock
                shutil.rmtree(target, ignore_errors=True)
                partial.mkdir()
                try:
                    _build(partial, records(), size, progress, classes, corrupt)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                partial.rename(target)
    splits = _open(target)
    for pixels in splits.values():  # a cache that was made with "skip" does not let damage pass later
        _refuse(pixels.damaged, corrupt)
    return splits


def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """RGB pixels, (size, size, 3) uint8. Raises: OSError, SyntaxError or ValueError when the bytes are no whole image."""
    ImageOps = require("PIL.ImageOps", extra="experiments", purpose="decoding images")
    Image = require("PIL.Image", extra="experiments", purpose="decoding images")
    pixels = open_image(data)
    return np.asarray(ImageOps.fit(pixels, (size, size), Image.Resampling.BILINEAR) if pixels.size != (size, size) else pixels)


def open_image(data: bytes) -> Any:
    """A PIL image in RGB, whatever its mode: grey, palette, CMYK, 16 bits. Raises: as ``decode_image``."""
    Image = require("PIL.Image", extra="experiments", purpose="decoding images")
    if data.startswith(b"\x89PNG") and PNG_END not in data:
        raise OSError("image file is truncated")
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.mode.startswith("I"):  # 16 or 32 bits of grey: Pillow would clip at 255
            grey = np.asarray(image.convert("I")) >> 8
            return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def damage(origin: str, error: Exception) -> str:
    """The message that names an image that cannot be decoded."""
    if isinstance(error, DataError):
        return str(error)
    return f"{origin} is not a whole image: " + ("no image of a known format" if "cannot identify" in str(error) else str(error))


def _decode_chunk(records: list[Record], size: int) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Pixels of the records, and a message for each that failed."""
    pixels, failures = np.zeros((len(records), size, size, 3), np.uint8), {}
    for place, record in enumerate(records):
        try:
            if isinstance(record.data, DataError):
                raise record.data
            pixels[place] = decode_image(record.data, size) if isinstance(record.data, bytes) else record.data
        except (OSError, SyntaxError, ValueError, DataError) as error:
            failures[place] = damage(record.origin, error)
    return pixels, failures


def _decoded(records: Iterable[Record], size: int) -> Iterator[tuple[list[Record], tuple[NDArray[np.uint8], dict[int, str]]]]:
    """Chunks of records with what became of them, in order. A single chunk is decoded here: two processes would cost more."""
    rest = iter(records)
    first = list(islice(rest, CHUNK))
    second = list(islice(rest, CHUNK))
    if not second:
        yield first, _decode_chunk(first, size)
        return
    # A forked child does not run the caller's script again; where fork is unsafe (macOS), scripts need the usual __main__ guard.
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    waiting: deque[tuple[list[Record], Future[tuple[NDArray[np.uint8], dict[int, str]]]]] = deque()
    try:
        with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
            chunk: list[Record] = first
            following: list[Record] = second
            while chunk or waiting:
                if chunk and len(waiting) < 2 * WORKERS:  # a bounded window: the archive's bytes are never all in memory
                    waiting.append((chunk, pool.submit(_decode_chunk, chunk, size)))
                    chunk, following = following, list(islice(rest, CHUNK))
                else:
                    done, future = waiting.popleft()
                    yield done, future.result()
    except BrokenProcessPool as error:
        raise DataError("a decoding process was killed (out of memory?): run the command again") from error


def _refuse(damaged: Iterable[str], corrupt: str) -> None:
    if corrupt == "error":
        for message in damaged:
            raise DataError(message)


def _build(
    folder: Path,
    records: Iterable[Record],
    size: int,
    progress: Callable[[int], None] | None,
    classes: list[str] | None,
    corrupt: str,
) -> None:
    """Write ``<split>.images``, ``<split>.index.npy`` (position, label) and, last, meta.json."""
    names: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    damaged: dict[str, list[str]] = {"train": [], "test": []}
    with (folder / "train.images").open("wb") as train, (folder / "test.images").open("wb") as test:
        files = {"train": train, "test": test}
        for chunk, (pixels, failures) in _decoded(records, size):
            _refuse(failures.values(), corrupt)
            for place, (record, image) in enumerate(zip(chunk, pixels, strict=True)):
                if place in failures:
                    damaged[record.split].append(failures[place])
                    continue
                files[record.split].write(image.tobytes())  # plain writes: on a full disk a memory map would be a bus error
                names[record.split].append((record.label, record.name))
            if progress is not None:
                progress(sum(map(len, names.values())))
    classes = classes or sorted({label for split in names.values() for label, _ in split})
    number = {name: index for index, name in enumerate(classes)}
    for split, entries in names.items():
        if not entries:
            raise DataError(f"the dataset has no {split} images" + "".join(f"; {message}" for message in damaged[split][:1]))
        keys = [(number[label], name) for label, name in entries]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        index = np.array([(position, number[entries[position][0]]) for position in order], np.int64)
        np.save(folder / f"{split}.index.npy", index)
    (folder / "meta.json").write_text(json.dumps({"size": size, "classes": classes, "damaged": damaged}))


def _open(folder: Path) -> dict[str, Pixels]:
    meta = json.loads((folder / "meta.json").read_text())
    size = meta["size"]
    splits = {}
    for split in ("train", "test"):
        index = np.load(folder / f"{split}.index.npy")
        images = np.memmap(folder / f"{split}.images", np.uint8, "r", shape=(len(index), size, size, 3))
        splits[split] = Pixels(images, index[:, 0], index[:, 1], meta["classes"], meta.get("damaged", {}).get(split, []))
    return splits

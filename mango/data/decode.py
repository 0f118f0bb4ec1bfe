"""From image files to one memory-mapped array of bytes, made once.

A source yields records; JPEG and PNG bytes are decoded by two processes; pixels are appended to a file in a temporary folder that is
renamed when it is complete, so that a killed process leaves nothing that could be taken for a cache. Archives are read as streams: no file
of theirs is ever written out, so none can land outside the cache.
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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mango.compat import require
from mango.data.sources import locked
from mango.errors import DataError

CHUNK = 256  # images per task: large enough that sending them costs little beside decoding
WORKERS = 2
PNG_END = b"IEND\xaeB`\x82"  # Pillow accepts a PNG that lacks its last chunk; we do not


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a dataset.

    Attributes:
        split: "train" or "test".
        label: name of its class.
        name: a name that is unique within the split and class and gives the order.
        data: encoded bytes, or pixels of shape (size, size, 3), uint8.
        origin: the file to name when it cannot be decoded.
    """

    split: str
    label: str
    name: str
    data: bytes | NDArray[np.uint8]
    origin: str


@dataclass(frozen=True)
class Pixels:
    """One split of a decoded dataset, in the order of class and name.

    Attributes:
        images: memory map, (n, size, size, 3) uint8, in the order in which the source gave them.
        position: (n,) int64, where the i-th image lies in ``images``.
        labels: (n,) int64, class of the i-th image.
        classes: names of the classes.
    """

    images: NDArray[np.uint8]
    position: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: list[str]


def cached(
    folder: Path, key: str, records: Callable[[], Iterable[Record]], size: int, progress: Callable[[int], None] | None
) -> dict[str, Pixels]:
    """The decoded dataset ``key``, built from ``records()`` when the cache under ``folder`` lacks it.

    Args:
        size: height and width in pixels; other images are resized (bilinear, antialiased).
        progress: called with the number of images decoded so far.

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
                    _build(partial, records(), size, progress)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                partial.rename(target)
    return _open(target)


def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """RGB pixels, (size, size, 3) uint8. Raises: OSError, SyntaxError or ValueError when the bytes are no whole JPEG or PNG."""
    Image = require("PIL.Image", extra="experiments", purpose="decoding images")
    if data.startswith(b"\x89PNG") and PNG_END not in data:
        raise OSError("image file is truncated")
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        pixels = image.convert("RGB")
    if pixels.size != (size, size):
        pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(pixels)


def _decode_chunk(records: list[Record], size: int) -> tuple[NDArray[np.uint8], str | None]:
    """Pixels of the records, and a message naming the first file that failed."""
    pixels = np.empty((len(records), size, size, 3), np.uint8)
    for row, record in zip(pixels, records, strict=True):
        try:
            row[:] = decode_image(record.data, size) if isinstance(record.data, bytes) else record.data
        except (OSError, SyntaxError, ValueError) as error:
            reason = "no JPEG or PNG" if "cannot identify" in str(error) else str(error)
            return pixels, f"{record.origin} is not a whole image: {reason}"
    return pixels, None


def _decoded(records: Iterable[Record], size: int) -> Iterator[tuple[list[Record], NDArray[np.uint8]]]:
    """Chunks of records with their pixels, in order. A single chunk is decoded here: two processes would cost more than they save."""
    rest = iter(records)
    first = list(islice(rest, CHUNK))
    second = list(islice(rest, CHUNK))
    if not second:
        yield first, _checked(_decode_chunk(first, size))
        return
    # A forked child does not run the caller's script again; where fork is unsafe (macOS), scripts need the usual __main__ guard.
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    waiting: deque[tuple[list[Record], Future[tuple[NDArray[np.uint8], str | None]]]] = deque()
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
                    yield done, _checked(future.result())
    except BrokenProcessPool as error:
        raise DataError("a decoding process was killed (out of memory?): run the command again") from error


def _checked(result: tuple[NDArray[np.uint8], str | None]) -> NDArray[np.uint8]:
    pixels, failure = result
    if failure is not None:
        raise DataError(failure)
    return pixels


def _build(folder: Path, records: Iterable[Record], size: int, progress: Callable[[int], None] | None) -> None:
    """Write ``<split>.images``, ``<split>.index.npy`` (position, label) and, last, meta.json."""
    names: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    with (folder / "train.images").open("wb") as train, (folder / "test.images").open("wb") as test:
        files = {"train": train, "test": test}
        for chunk, pixels in _decoded(records, size):
            for record, image in zip(chunk, pixels, strict=True):
                files[record.split].write(image.tobytes())  # plain writes: on a full disk a memory map would be a bus error
                names[record.split].append((record.label, record.name))
            if progress is not None:
                progress(sum(map(len, names.values())))
    classes = sorted({label for split in names.values() for label, _ in split})
    number = {name: index for index, name in enumerate(classes)}
    for split, entries in names.items():
        if not entries:
            raise DataError(f"the dataset has no {split} images")
        order = sorted(range(len(entries)), key=entries.__getitem__)
        index = np.array([(position, number[entries[position][0]]) for position in order], np.int64)
        np.save(folder / f"{split}.index.npy", index)
    (folder / "meta.json").write_text(json.dumps({"size": size, "classes": classes}))


def _open(folder: Path) -> dict[str, Pixels]:
    meta = json.loads((folder / "meta.json").read_text())
    size = meta["size"]
    splits = {}
    for split in ("train", "test"):
        index = np.load(folder / f"{split}.index.npy")
        images = np.memmap(folder / f"{split}.images", np.uint8, "r", shape=(len(index), size, size, 3))
        splits[split] = Pixels(images, index[:, 0], index[:, 1], meta["classes"])
    return splits

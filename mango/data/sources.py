"""Where data lies on this machine: the data folder, the cache, checksums and a lock that processes share."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mango.errors import DataError

CHECKOUT = Path(__file__).resolve().parents[2]


def data_root() -> Path | None:
    """The folder that holds local datasets: ``$MANGO_DATA``, else ``../shared/data`` beside the checkout, else None.

    An empty ``$MANGO_DATA`` means that there is none.

    Raises: DataError when ``$MANGO_DATA`` names something that is not a folder.
    """
    named = os.environ.get("MANGO_DATA")
    if named is not None:
        if not named:
            return None
        if not Path(named).is_dir():
            raise DataError(f"MANGO_DATA = {named!r} is not a folder: set it to the folder that holds cifar10/ or its archive, or unset it")
        return Path(named)
    beside = CHECKOUT.parent / "shared" / "data"
    return beside if beside.is_dir() else None


def cache_root() -> Path:
    """The folder for decoded datasets and downloads: ``$MANGO_CACHE``, else ``~/.cache/mango``. Made when it is absent."""
    folder = Path(os.environ.get("MANGO_CACHE") or Path.home() / ".cache" / "mango")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str) -> str:
    """The file's SHA-256.

    Raises: DataError naming the file, what was expected and what was found, when they differ.
    """
    found = sha256(path)
    if found != expected:
        raise DataError(f"{path} is damaged or another version: expected sha256 {expected}, got {found}")
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (made when absent). The kernel drops it when the process ends, however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

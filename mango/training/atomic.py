"""Files that are either wholly there or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write ``path`` by ``fill(file)`` under a temporary name, force it to the disk, then rename it into place.

    Raises: OSError when it cannot be written (a full disk); the previous file, if any, is then untouched and nothing is left beside it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Make ``folder``, and check that files can be made in it before any work is done.

    Root may write where the mode bits forbid it; a folder without any write bit is refused all the same: someone meant it to stay so.

    Raises: PermissionError or another OSError naming the folder.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(20, "not a folder", str(existing))
    if existing.stat().st_mode & 0o222 == 0 or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(13, "read-only folder, choose a writable one", str(existing))
    folder.mkdir(parents=True, exist_ok=True)

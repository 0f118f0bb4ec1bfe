"""Checkpoints: one file, written atomically, readable with ``weights_only=True`` (tensors and plain values, no code)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from mango.errors import DataError
from mango.training import atomic

VERSION = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint at ``path``. Raises: OSError when it cannot be written; the previous checkpoint is then still there."""

    def fill(file: Any) -> None:
        try:
            torch.save({"version": VERSION, **content}, file)
        except RuntimeError as error:  # torch's writer turns the operating system's error into its own
            raise OSError(f"{path} could not be written (is the disk full?): {str(error).splitlines()[0]}") from error

    atomic.write(path, fill)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at ``path``, on the CPU. Raises: DataError when it is damaged or of another version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise DataError(f"{path} is not a whole checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise DataError(f"{path} is not a checkpoint of version {VERSION}: start over with --force")
    return content

"""Metrics as JSON lines: written at once, whole lines only, and restored exactly when a run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path


class RunLog:
    """Appends one JSON object a line to a file, with its keys in a fixed order.

    A line is either wholly in the file or not at all: when the disk is full the file is cut back to its last whole line.

    Args:
        path: the file; it is started anew with ``lines``, so that what was logged after the checkpoint of a resumed run is dropped.
        lines: the lines that a checkpoint kept.
    """

    def __init__(self, path: Path, lines: Sequence[str] = ()) -> None:
        self.lines = list(lines)
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text("".join(line + "\n" for line in self.lines))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, row: dict[str, object]) -> None:
        """Append one row. Raises: OSError when it cannot be written; ValueError when it holds a number that JSON does not know."""
        line = json.dumps(row, allow_nan=False)
        data = (line + "\n").encode()
        end = self._file.tell()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(end)
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self.lines.append(line)

    def sync(self) -> None:
        """Have the operating system put every line on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

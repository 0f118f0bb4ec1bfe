"""Web text in shards: parquet, as FineWeb-Edu is published, or gzipped JSON lines, as C4 is; a row's ``text`` is a document."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mango.compat import require
from mango.data.sources import data_root
from mango.data.text import TextSource
from mango.data.tokenizer import DOCUMENT
from mango.errors import ConfigError, DataError

FOLDER = "fineweb-edu"
C4 = "c4"
LINES = "*.json*.gz"  # C4's own names end in .json.gz
COLUMN = "text"
ROWS = 256  # documents that are in memory at a time
FOOTER = 1 << 16  # bytes at a shard's end, where parquet keeps its statistics


@dataclass(frozen=True)
class Shards(TextSource):
    """All ``*.parquet`` below a folder, in the order of their names; each document behind a zero byte."""

    path: Path
    title = "FineWeb-Edu (parquet shards)"

    def files(self) -> list[Path]:
        """Every shard."""
        return sorted(self.path.rglob("*.parquet"))

    def key(self) -> str:
        listing = hashlib.sha256()
        for file in self.files():
            with file.open("rb") as shard:
                size = shard.seek(0, 2)
                shard.seek(max(0, size - FOOTER))
                listing.update(f"{file.relative_to(self.path)}:{size}\n".encode() + shard.read())
        return listing.hexdigest()[:16]

    def parts(self) -> Iterator[bytes]:
        parquet = require("pyarrow.parquet", extra="experiments", purpose="reading parquet shards")
        arrow = require("pyarrow", extra="experiments", purpose="reading parquet shards")
        for file in self.files():
            try:
                shard = parquet.ParquetFile(file)
                if COLUMN not in shard.schema_arrow.names:
                    raise DataError(f"{file} has no column {COLUMN!r}: its columns are {', '.join(shard.schema_arrow.names)}")
                for rows in shard.iter_batches(ROWS, columns=[COLUMN]):
                    for document in filter(None, rows.column(0).to_pylist()):
                        yield (DOCUMENT + document.replace(DOCUMENT, "")).encode()
            except (arrow.ArrowException, OSError) as error:
                raise DataError(f"{file} is not a whole parquet file: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Lines(Shards):
    """The same for gzipped JSON lines."""

    title = "C4 (shards of JSON lines)"

    def files(self) -> list[Path]:
        return sorted(self.path.rglob(LINES))

    def parts(self) -> Iterator[bytes]:
        for file in self.files():
            number = 0
            try:
                with gzip.open(file, "rt", encoding="utf-8") as shard:
                    for line in shard:
                        number += 1
                        document = json.loads(line)[COLUMN]
                        if document:
                            yield (DOCUMENT + document.replace(DOCUMENT, "")).encode()
            except (EOFError, OSError, ValueError, KeyError, TypeError, zlib.error) as error:
                raise DataError(f"{file} is not a whole file of JSON lines with {COLUMN!r}: line {number}, {error!r}") from error


def find(source: str) -> tuple[str, TextSource]:
    """FineWeb-Edu: see ``mango.data.find``."""
    return _find(source, FOLDER, Shards, "*.parquet")


def find_c4(source: str) -> tuple[str, TextSource]:
    """C4: see ``mango.data.find``."""
    return _find(source, C4, Lines, LINES)


def _find(source: str, folder: str, kind: type[Shards], pattern: str) -> tuple[str, TextSource]:
    from mango.data.stdlib import PythonDocs

    if source == "download":
        raise ConfigError.of("data.source", source, f"auto, local or embedded: put shards into {folder}/ of the data folder by hand")
    root = data_root() if source != "embedded" else None
    if root is not None and next((root / folder).rglob(pattern), None) is not None:
        return "local", kind(root / folder)
    if source == "local":
        place = f"nothing of it in {root}" if root is not None else "there is no data folder (set MANGO_DATA)"
        raise DataError(f"data.source = 'local' but {folder} was not found: {place}; expected {folder}/{pattern}")
    return "embedded", PythonDocs()

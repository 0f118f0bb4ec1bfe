"""Web text in parquet shards, as FineWeb-Edu and ClimbMix are published: a row is a document, its column ``text`` the document's text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mango.compat import require
from mango.data.sources import data_root
from mango.data.text import TextSource
from mango.data.tokenizer import DOCUMENT
from mango.errors import ConfigError, DataError

FOLDER = "fineweb-edu"
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


def find(source: str) -> tuple[str, TextSource]:
    """See ``mango.data.find``."""
    from mango.data.stdlib import PythonDocs

    if source == "download":
        raise ConfigError.of("data.source", source, f"auto, local or embedded: put shards into {FOLDER}/ of the data folder by hand")
    root = data_root() if source != "embedded" else None
    if root is not None and next((root / FOLDER).rglob("*.parquet"), None) is not None:
        return "local", Shards(root / FOLDER)
    if source == "local":
        place = f"nothing of it in {root}" if root is not None else "there is no data folder (set MANGO_DATA)"
        raise DataError(f"data.source = 'local' but fineweb-edu was not found: {place}; expected {FOLDER}/*.parquet")
    return "embedded", PythonDocs()

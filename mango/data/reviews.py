"""Movie reviews (Pang and Lee 2004), a second domain of text for fine-tuning; Python's own code stands in for it and says so."""

from __future__ import annotations

import ast
import hashlib
import io
import lzma
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mango.data.sources import data_root, verify
from mango.data.stdlib import PythonDocs
from mango.data.text import TextSource
from mango.errors import ConfigError, DataError

ARCHIVE = "text/movie_reviews.tar.xz"
ARCHIVE_SHA256 = "5c5bf4958337c799fc18b9c27faedfca017c9968d79c13fc727231f7971e6db1"


@dataclass(frozen=True)
class Reviews(TextSource):
    """All reviews, in the order of a hash of their names, so that every split holds both kinds."""

    path: Path
    title = "movie reviews (Pang and Lee)"

    def key(self) -> str:
        return verify(self.path, ARCHIVE_SHA256)[:16]

    def parts(self) -> Iterator[bytes]:
        return (text + b"\n\n" for _, text in self.documents())

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """(name in the archive, text) of every review. Raises: DataError when the archive is damaged."""
        try:
            whole = io.BytesIO(lzma.decompress(self.path.read_bytes()))  # a compressed file would be read from its start for every member
            with tarfile.open(fileobj=whole) as archive:
                members = [member for member in archive if member.isfile() and member.name.endswith(".txt")]
                members.sort(key=lambda member: hashlib.sha256(member.name.encode()).digest())
                for member in members:
                    file = archive.extractfile(member)
                    assert file is not None  # a regular file
                    yield member.name, file.read().decode(errors="replace").strip().encode()
        except (lzma.LZMAError, tarfile.TarError) as error:
            raise DataError(f"{self.path} is not a whole tar.xz file: {error}") from error


class PythonCode(PythonDocs):
    """The standard library's code without comments and docstrings, so that it shares no text with the documentation."""

    title = "Python's code (embedded stand-in)"

    def parts(self) -> Iterator[bytes]:
        files = sorted(self.modules(), key=lambda file: hashlib.sha256(file[0].encode()).digest())
        for _, path in files:
            code = bare(path)
            if code:
                yield code.encode(errors="replace") + b"\n\n"


def bare(path: Path) -> str:
    """A module printed from its syntax tree, which has no comments, with its docstrings taken out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in some modules
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates of code are no modules
            return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def find(source: str) -> tuple[str, TextSource]:
    """See ``mango.data.find``."""
    path = archive(source, "movie-reviews")
    return ("embedded", PythonCode()) if path is None else ("local", Reviews(path))


def archive(source: str, name: str) -> Path | None:
    """The archive of reviews for data set ``name``; None = its stand-in is asked for, or all there is.

    Raises: ConfigError when it is to be downloaded; DataError when source is "local" and it is not there.
    """
    if source == "download":
        raise ConfigError.of("data.source", source, f"auto, local or embedded: put {ARCHIVE} into the data folder by hand")
    root = data_root() if source != "embedded" else None
    if root is not None and (root / ARCHIVE).is_file():
        return root / ARCHIVE
    if source == "local":
        place = f"nothing of it in {root}" if root is not None else "there is no data folder (set MANGO_DATA)"
        raise DataError(f"data.source = 'local' but {name} was not found: {place}; expected {ARCHIVE}")
    return None

"""English that every Python carries: the documentation in its standard library. It stands in for a corpus and says so in its title."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mango.data.text import TextSource

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "turtledemo"}  # not the library, or little prose
TOPICS = "pydoc_data/topics.py"  # the language reference that help() shows, as a dictionary of texts
SHORTEST = 200  # characters; modules with less are lists of names


class PythonDocs(TextSource):
    """Docstrings of the standard library's modules, and the texts of ``help()``, of the interpreter that runs.

    Documents come in the order of a hash of their names, so that every split holds all kinds.
    """

    title = "Python's documentation (embedded stand-in)"

    def key(self) -> str:
        listing = hashlib.sha256()
        for name, path in self.modules():
            listing.update(f"{name}:{path.stat().st_size}\n".encode())
        return f"{platform.python_version()}-{listing.hexdigest()[:16]}"

    def parts(self) -> Iterator[bytes]:
        found = [(name, text) for name, path in self.modules() for name, text in documents(name, path)]
        found.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
        yield "\n\n".join(text for _, text in found).encode(errors="replace") + b"\n"

    def modules(self) -> Iterator[tuple[str, Path]]:
        """(name, place) of every module of the library."""
        root = Path(sysconfig.get_path("stdlib"))
        for folder, inside, files in os.walk(root):
            inside[:] = sorted(set(inside) - SKIPPED)
            for name in sorted(files):
                if name.endswith(".py"):
                    yield (Path(folder) / name).relative_to(root).as_posix(), Path(folder) / name


def documents(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each topic, or of the module with all its docstrings in the order of the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in some modules
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates of code are no modules
            return
    if name == TOPICS:
        for statement in tree.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Dict):
                yield from ((f"{name}:{key}", text.strip()) for key, text in ast.literal_eval(statement.value).items())
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
    if len(text) >= SHORTEST:
        yield name, text

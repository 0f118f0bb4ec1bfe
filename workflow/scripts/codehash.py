"""A hash of exactly the source code that a job depends on, for Snakemake's ``params: code=...``.

Snakemake re-runs a job when its parameters change, but does not see that the library behind a shell command was edited. A hash of the whole
library would re-run everything after any edit, so the hash is taken over what the job's modules reach by import, read without running them:

* Names are followed, not files: from ``from mango.optim import build`` (or ``optim.build`` after ``from mango import optim``) the search
  goes to the statements that bind ``build``, to the names these use, to the imports behind those names, and so on. Imports inside functions
  count. Those under ``TYPE_CHECKING`` do not, except beside a module's ``__getattr__``: there they say where the lazy names are. Top-level
  statements that bind no name (a call for its side effect) always count.
* A module that is reached counts whole, byte by byte; a package's ``__init__``, which every import of a submodule executes and which is
  but a list of names, counts only by the statements that were reached. House rule behind this: an ``__init__`` has no side effects.
* A module that is used as an object (passed on, or a star import) is reached with all its names.
* A registry's entries are strings, which no import shows: an entry counts only for the jobs that name it (``workflow/scripts/jobs.py``
  adds it to the roots).

    python workflow/scripts/codehash.py mango.optim.mango:Mango      prints the hash and what it covers
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Chain = tuple[str, ...]  # a dotted use of a name: codecs.get -> ("codecs", "get")


def digest(roots: Iterable[str], root: Path = ROOT) -> str:
    """Sixteen hex digits that change exactly when the code behind ``roots`` changes.

    Args:
        roots: ``package.module``, ``package.module:name``, or paths (relative to ``root``) of scripts and notebooks.
        root: the folder that holds the packages.
    """
    total = hashlib.sha256()
    for name, content in sorted(pieces(roots, root).items()):
        total.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def pieces(roots: Iterable[str], root: Path = ROOT) -> dict[str, bytes]:
    """File, or ``file:names`` for a statement of an ``__init__`` -> the source that counts.

    Raises: FileNotFoundError for a root that is not there.
    """
    search = _Search(root)
    for item in roots:
        if item.endswith((".py", ".ipynb")):
            search.all(search.source(root / item, ""))
        else:
            module, _, name = item.partition(":")
            if search.find(module) is None:
                raise FileNotFoundError(f"no module {module} under {root}")
            search.resolve(module, (name,) if name else ())
    return search.pieces


class _Source:
    """A parsed file: its imports, and the top-level statements that bind each name."""

    def __init__(self, path: Path, package: str, content: bytes) -> None:
        self.path = path
        self.package = package  # what relative imports start from
        self.bytes = content
        self._chains: dict[ast.stmt, set[Chain]] = {}
        self._imports: dict[ast.stmt, list[tuple[str, str, str | None]]] = {}

    @cached_property
    def text(self) -> str:
        if self.path.suffix != ".ipynb":
            return self.bytes.decode()
        cells = [cell for cell in json.loads(self.bytes)["cells"] if cell["cell_type"] == "code"]
        lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
        return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)

    @cached_property
    def tree(self) -> ast.Module:
        tree = ast.parse(self.text, str(self.path))
        if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body):
            for node in ast.walk(tree):  # type checkers' imports are not executed
                if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                    node.body = [ast.Pass()]
        return tree

    def chains(self, statement: ast.stmt) -> set[Chain]:
        """Every dotted use of a name in a top-level statement."""
        if statement not in self._chains:
            self._chains[statement] = _chains(statement)
        return self._chains[statement]

    def imports(self, statement: ast.stmt) -> list[tuple[str, str, str | None]]:
        """(name bound here, module, name there or None) of every import in a top-level statement, those inside functions included."""
        if statement not in self._imports:
            self._imports[statement] = list(self._imported(statement))
        return self._imports[statement]

    def _imported(self, statement: ast.stmt) -> Iterator[tuple[str, str, str | None]]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname:
                        yield alias.asname, alias.name, None
                    else:
                        yield alias.name.partition(".")[0], alias.name.partition(".")[0], None
                        yield "", alias.name, None
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.package.split(".")
                    base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
                for alias in node.names:
                    yield alias.asname or alias.name, base, alias.name

    @cached_property
    def bindings(self) -> dict[str, list[ast.stmt]]:
        """Name -> the top-level statements, imports included, that bind it; those that bind nothing are under the empty name."""
        found: dict[str, list[ast.stmt]] = {}
        docstring = ast.get_docstring(self.tree) is not None
        for statement in self.tree.body[docstring:]:
            for name in _bound(statement) or {""}:
                found.setdefault(name, []).append(statement)
        return found

    def segment(self, node: ast.stmt) -> bytes:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(self.text.splitlines()[first - 1 : node.end_lineno]).encode()


def _bound(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names.union(*(_bound(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)))


def _chains(node: ast.AST) -> set[Chain]:
    """Every dotted use of a name, at its longest: a.b.c gives (a, b, c) and not (a, b)."""
    found: set[Chain] = set()

    def visit(inner: ast.AST, tail: Chain) -> None:
        if isinstance(inner, ast.Attribute):
            visit(inner.value, (inner.attr, *tail))
            return
        if isinstance(inner, ast.Name):
            found.add((inner.id, *tail))
        for child in ast.iter_child_nodes(inner):
            visit(child, ())

    visit(node, ())
    return found


@cache
def _parsed(path: Path, package: str, content: bytes) -> _Source:
    """Files are parsed once for all the hashes of a workflow."""
    return _Source(path, package, content)


class _Search:
    """Follows names; each statement is visited once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pieces: dict[str, bytes] = {}
        self.sources: dict[Path, _Source] = {}
        self.used: set[tuple[Path, Chain]] = set()
        self.reached: set[ast.stmt] = set()

    def find(self, module: str) -> Path | None:
        """The file of a module of this tree; None for anything else (the standard library, installed packages)."""
        base = self.root / module.replace(".", "/")
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)

    def source(self, path: Path, module: str) -> _Source:
        """The parsed file; on the first call it is counted, and so are its statements that bind nothing."""
        if path not in self.sources:
            if not path.is_file():
                raise FileNotFoundError(f"no such script or notebook: {path}")
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            source = self.sources[path] = _parsed(path, package, path.read_bytes())
            if path.name != "__init__.py":
                self.pieces[str(path.relative_to(self.root))] = source.text.encode() if path.suffix == ".ipynb" else source.bytes
            for statement in source.bindings.get("", []):
                self.reach(source, statement)
        return self.sources[path]

    def resolve(self, module: str, attributes: Chain) -> None:
        """Follow ``module.attributes``."""
        path = self.find(module)
        if path is None:
            return
        inner = f"{module}.{attributes[0]}" if attributes else ""
        if path.name == "__init__.py" and inner and self.find(inner):
            self.resolve(inner, attributes[1:])
            return
        source = self.source(path, module)
        if attributes and attributes[0] in source.bindings:
            self.use(source, attributes)
        elif not (attributes and attributes[0].startswith("__")):  # mango.__file__ names no code
            self.all(source)

    def all(self, source: _Source) -> None:
        """Follow every name that a module defines, and those that an ``__init__`` passes on."""
        for name, statements in source.bindings.items():
            imported = all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in statements)
            if name and (source.path.name == "__init__.py" or not imported):
                self.use(source, (name,))

    def use(self, source: _Source, chain: Chain) -> None:
        """Follow a name of a module, and what is asked of it."""
        if (source.path, chain) in self.used:
            return
        self.used.add((source.path, chain))
        for statement in source.bindings[chain[0]]:
            for bound, module, name in source.imports(statement):
                if bound == chain[0]:
                    self.resolve(module, (*((name,) if name and name != "*" else ()), *chain[1:]))
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                self.reach(source, statement)

    def reach(self, source: _Source, statement: ast.stmt) -> None:
        """Count a statement, and follow the names that it uses."""
        if statement in self.reached:
            return
        self.reached.add(statement)
        if source.path.name == "__init__.py":
            key = f"{source.path.relative_to(self.root)}:{','.join(sorted(_bound(statement)))}"
            self.pieces[key] = self.pieces.get(key, b"") + source.segment(statement)
        chains = source.chains(statement)
        for chain in chains:
            if chain[0] in source.bindings:
                self.use(source, chain)
        for bound, module, name in source.imports(statement):
            if bound in source.bindings:
                continue  # followed by name, above; what is left are imports inside functions
            uses = {chain[1:] for chain in chains if chain[0] == bound} or {()}
            for use in uses if bound != module else set():
                self.resolve(module, (*((name,) if name and name != "*" else ()), *use))


if __name__ == "__main__":
    print(digest(sys.argv[1:]))
    print("\n".join(sorted(pieces(sys.argv[1:]))))

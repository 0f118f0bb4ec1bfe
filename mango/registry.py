"""One registry per kind of component (codec, compressor, optimizer, policy).

Entries are import paths, loaded on first use: ``import mango`` stays light, and the workflow can tell which source files a run depends on.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from mango.errors import ConfigError


class Registry:
    """Maps a name to the class or factory behind it.

    Args:
        kind: what the entries are, for messages ("codec", "optimizer", ...).
        entries: name -> ``"package.module:attribute"``.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self.entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def module(self, name: str) -> str:
        """The module that defines ``name``."""
        return self._path(name).partition(":")[0]

    def load(self, name: str) -> Any:
        """The class or factory itself."""
        module, _, attribute = self._path(name).partition(":")
        return getattr(import_module(module), attribute)

    def get(self, name: str, **options: Any) -> Any:
        """An instance, built with ``options``."""
        return self.load(name)(**options)

    def _path(self, name: str) -> str:
        if name not in self.entries:
            raise ConfigError.of(self.kind, name, "one of " + ", ".join(sorted(self.entries)))
        return self.entries[name]

"""YAML as people expect it: ``3e-3`` is a number (YAML 1.2) and a key that is given twice is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mango.errors import ConfigError, MissingExtra

try:
    import yaml
except ImportError as error:
    raise MissingExtra.of("PyYAML", "experiments", "reading configuration files") from error


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Raises: ConfigError naming ``where`` and the line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read(path: Path) -> Any:
    """The value of a YAML file. Raises: ConfigError when it is absent, not UTF-8 or not YAML."""
    if not path.is_file():
        raise ConfigError.of("--config", str(path), "an existing YAML file, for example workflow/config/laptop.yaml")
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8: {error}") from None

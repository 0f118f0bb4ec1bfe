"""Options as dataclasses that are built from plain values, as a configuration file has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from mango.errors import ConfigError

T = TypeVar("T")


def build(kind: type[T], value: T | Mapping[str, Any], name: str, legal: str) -> T:
    """A dataclass from itself or from a mapping of its fields.

    Args:
        name: of the option, for messages.
        legal: what it may be.

    Raises: ConfigError for another type or an unknown field.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError.of(name, value, legal)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            raise ConfigError.of(name, key, "one of the fields " + ", ".join(known))
    return kind(**value)

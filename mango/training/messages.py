"""pydantic's errors in the house's one-line form: field by dotted path, value, what is legal."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first error, unknown keys before others: ``train.steps = 0 is not legal: greater than or equal to 1 (and 2 more)``."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda one: one["type"] != "extra_forbidden")  # a misspelt key explains the one that is missing
    path, owner = _path(first["loc"], model)
    value = repr(first["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    match first["type"]:
        case "extra_forbidden":
            known = ", ".join(sorted(owner.model_fields)) if owner is not None else "no such key"
            text = f"{path} is an unknown key (value {value}): the keys here are {known}"
        case "missing":
            text = f"{path} is missing: it has no default"
        case "value_error":  # our own validators already say field, value and what is legal
            own = str(first["ctx"]["error"])
            text = f"{path}.{own}" if path else own
        case "union_tag_invalid":
            text = f"{path}.name = {first['ctx']['tag']!r} is not legal: one of {first['ctx']['expected_tags']}"
        case "union_tag_not_found":
            text = f"{path}.name is missing: it has no default"
        case _:
            legal = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            text = f"{path or 'the file'} = {value} is not legal: {legal}"
    return text if len(errors) == 1 else f"{text} (and {len(errors) - 1} more)"


def _path(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted path without pydantic's union tags, and the class whose key the last part is (None when it is no class's)."""
    parts: list[str] = []
    here: Any = model
    owner: type[BaseModel] | None = None
    for part in location:
        if isinstance(here, type) and issubclass(here, BaseModel):
            owner = here
            field = here.model_fields.get(str(part))
            here = field.annotation if field is not None else None
            parts.append(str(part))
            continue
        members = [member for member in _classes(here) if part in _tags(member)]
        if members:  # a union's tag, which is no key of the file
            here = members[0]
            continue
        owner, inside = None, _classes(here)
        if isinstance(part, int) or len(inside) == 1:
            here = inside[0] if inside else None
        parts.append(str(part))
    return ".".join(parts), owner


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """Every configuration class inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _classes(argument)]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """The names by which a union knows the class."""
    field = model.model_fields.get("name")
    return get_args(field.annotation) if field is not None else ()

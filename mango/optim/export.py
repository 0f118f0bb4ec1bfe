"""An optimizer's state as a safetensors file: tensors, and everything else as JSON in the header. No pickle is written or read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mango.compat import require
from mango.errors import ConfigError

KEY = "mango.optimizer"


def save_safetensors(optimizer: torch.optim.Optimizer, path: str | os.PathLike[str]) -> None:
    """Write ``optimizer.state_dict()``; the file appears whole or not at all.

    Raises: MissingExtra without the package safetensors; ConfigError for a state that is not tensors and plain values.
    """
    library = require("safetensors.torch", extra="experiments", purpose="saving an optimizer's state as safetensors")
    tensors: dict[str, Tensor] = {}
    header = {KEY: json.dumps(_strip(optimizer.state_dict(), "", tensors))}
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    library.save_file(tensors, str(partial), metadata=header)
    os.replace(partial, target)


def load_safetensors(optimizer: torch.optim.Optimizer, path: str | os.PathLike[str]) -> None:
    """Restore what ``save_safetensors`` wrote, bit for bit.

    Raises: ConfigError for a file that holds something else, and what the optimizer's ``load_state_dict`` raises.
    """
    library = require("safetensors", extra="experiments", purpose="loading an optimizer's state from safetensors")
    try:
        with library.safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except library.SafetensorError as error:
        raise ConfigError.of("path", str(path), f"a safetensors file ({error})") from None
    if header is None:
        raise ConfigError.of("path", str(path), "a file that save_safetensors wrote: this one holds no optimizer state")
    optimizer.load_state_dict(_fill(json.loads(header), tensors))


def _strip(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value with tensors taken out, in a form that JSON gives back exactly: dictionaries as lists of pairs, tuples marked."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous().clone()  # safetensors refuses tensors that share memory
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _strip(item, f"{name}.{key}".lstrip("."), tensors)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        items = [_strip(item, f"{name}.{place}", tensors) for place, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError.of(f"state {name}", value, "a tensor, a number, a string, or a container of these")


def _fill(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _fill(item, tensors) for key, item in content}
    items = [_fill(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items

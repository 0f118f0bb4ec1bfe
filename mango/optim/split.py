"""Which parameters are matrices that methods treat by their rule: the one choice that methods, controls and reports share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from mango.errors import ConfigError
from mango.optim.plan import is_adapter, is_matrix

Named = list[tuple[str, Tensor]]


def split(model_or_named: nn.Module | Iterable[tuple[str, Tensor]], exclude: Sequence[str] = ()) -> tuple[Named, Named]:
    """The trainable parameters as (matrices, rest), each in the model's order.

    A matrix has at least two dimensions and 4096 values, and a name in which none of the regular expressions of ``exclude`` is found
    (embeddings, first and last layers, as the experiment says). Factors of LoRA are never matrices.

    Raises:
        ConfigError: for a pattern that is not a regular expression, or that matches no parameter.
    """
    named: Named = list(model_or_named.named_parameters()) if isinstance(model_or_named, nn.Module) else list(model_or_named)
    excluded = {name for name, _ in matching(named, exclude, "exclude")}
    matrices: Named = []
    rest: Named = []
    for name, param in named:
        if param.requires_grad:
            matrix = is_matrix(param.shape) and name not in excluded and not is_adapter(name)
            (matrices if matrix else rest).append((name, param))
    return matrices, rest


def matching(named: Named, patterns: Sequence[str], field: str = "under_test") -> Named:
    """The parameters in whose names one of the regular expressions is found.

    Raises:
        ConfigError: for a pattern that is not a regular expression, or that matches no parameter.
    """
    found = set()
    for pattern in patterns:
        try:
            matched = {name for name, _ in named if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError.of(field, pattern, f"a regular expression ({error})") from None
        if not matched:
            names = ", ".join(name for name, _ in named[:8])
            raise ConfigError.of(field, pattern, f"a regular expression that is found in a parameter's name: {names}, …")
        found |= matched
    return [(name, param) for name, param in named if name in found]

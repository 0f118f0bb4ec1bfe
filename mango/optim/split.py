"""Which parameters are matrices under test: the one rule that methods, controls and reports share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from mango.errors import ConfigError
from mango.optim.plan import is_matrix

Named = list[tuple[str, Tensor]]


def split(model_or_named: nn.Module | Iterable[tuple[str, Tensor]], exclude: Sequence[str] = ()) -> tuple[Named, Named]:
    """The trainable parameters as (matrices, rest), each in the model's order.

    A matrix has at least two dimensions and 4096 values, and a name in which none of the regular expressions of ``exclude`` is found
    (embeddings, first and last layers, as the experiment says).

    Raises:
        ConfigError: for a pattern that is not a regular expression, or that matches no parameter.
    """
    named = list(model_or_named.named_parameters()) if isinstance(model_or_named, nn.Module) else list(model_or_named)
    patterns = []
    for pattern in exclude:
        try:
            patterns.append(re.compile(pattern))
        except re.error as error:
            raise ConfigError.of("exclude", pattern, f"a regular expression ({error})") from None
        if not any(patterns[-1].search(name) for name, _ in named):
            names = ", ".join(name for name, _ in named[:8])
            raise ConfigError.of("exclude", pattern, f"a regular expression that is found in a parameter's name: {names}, …")
    matrices: Named = []
    rest: Named = []
    for name, param in named:
        if param.requires_grad:
            under_test = is_matrix(param.shape) and not any(pattern.search(name) for pattern in patterns)
            (matrices if under_test else rest).append((name, param))
    return matrices, rest

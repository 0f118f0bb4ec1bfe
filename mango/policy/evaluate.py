"""How good a policy is: the hypervolume of what its runs cost, its regret, and intervals by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mango.errors import ConfigError


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """Volume that at least one of the points (n, k) dominates, below the reference (k,); every objective is minimised.

    By slices along the last objective (Fonseca et al. 2006): exact, and quick for the tens of points and few objectives here.

    >>> hypervolume(torch.tensor([[0.0, 0.5], [0.5, 0.0]]), torch.tensor([1.0, 1.0]))
    0.75
    """
    if points.ndim != 2 or points.shape[1:] != reference.shape:
        raise ConfigError.of("points", tuple(points.shape), f"(n, {len(reference)}), one column for each coordinate of the reference")
    inside = points[(points < reference).all(1)].double()
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside.min())
    levels = [*inside[:, -1].unique().tolist(), float(reference[-1])]
    return sum((high - low) * hypervolume(inside[inside[:, -1] <= low][:, :-1], reference[:-1].double()) for low, high in pairwise(levels))


def bootstrap(
    values: Sequence[float], statistic: Callable[[Tensor], float] | None = None, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic (the mean) of the values.

    Raises: ConfigError for fewer than two values.
    """
    if len(values) < 2:
        raise ConfigError.of("values", list(values), "at least two")
    x = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    found = x[picks].mean(1) if statistic is None else torch.tensor([statistic(x[pick]) for pick in picks], dtype=torch.float64)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def hutchpp(product: Callable[[Tensor], Tensor], dim: int, queries: int, generator: torch.Generator) -> float:
    """The trace of a symmetric matrix from products with it (Hutch++, arXiv:2010.09649).

    A third of the queries finds the range that carries most of the trace, a third takes its trace exactly, the rest estimates what is left.

    Args:
        product: x (dim, k) -> A x.
        queries: columns that the matrix is multiplied with, at least 3.
    """
    if queries < 3:
        raise ConfigError.of("queries", queries, "an integer >= 3")
    count = min(queries // 3, dim)
    sketch = torch.randint(0, 2, (dim, count), generator=generator).float() * 2 - 1
    probes = torch.randint(0, 2, (dim, count), generator=generator).float() * 2 - 1
    basis = torch.linalg.qr(product(sketch))[0]
    rest = probes - basis @ (basis.mT @ probes)
    exact = (basis * product(basis)).sum()
    return float(exact + (rest * product(rest)).sum() / count)

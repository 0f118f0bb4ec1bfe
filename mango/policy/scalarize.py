"""Several objectives (loss, bytes, seconds, joules) made one number; every objective is minimised.

A weighted sum with positive weights finds Pareto-optimal points only, but not all of them when the front is not convex; the augmented
Chebyshev scalarisation finds Pareto-optimal points only and, with ``chebyshev_weights``, each of them (theorem T8).
Source: Miettinen, Nonlinear Multiobjective Optimization, 1999, sections 3.1 and 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mango.errors import ConfigError, DataError


def weighted_sum(
    objectives: Tensor,  # (n, k): n alternatives, k objectives
    weights: Sequence[float] | Tensor,  # (k,) >= 0, not all zero; all > 0 for Pareto-optimal minimisers
) -> Tensor:
    """sum_i w_i y_i of each alternative, (n,) in float64. Raises: DataError, ConfigError."""
    y = _objectives(objectives)
    return y @ _weights(weights, y.shape[1])


def chebyshev(
    objectives: Tensor,  # (n, k)
    weights: Sequence[float] | Tensor,  # (k,) >= 0, not all zero
    reference: Sequence[float] | Tensor,  # (k,) strictly below the ideal point (the minimum of each objective)
    rho: float = 0.0,  # weight of the augmentation, >= 0; any rho > 0 makes minimisers Pareto-optimal
) -> Tensor:
    """max_i w_i (y_i - z_i) + rho sum_i w_i (y_i - z_i) of each alternative, (n,) in float64. Raises: DataError, ConfigError."""
    y = _objectives(objectives)
    if not rho >= 0.0:
        raise ConfigError.of("rho", rho, "a number >= 0")
    terms = (y - _reference(reference, y)) * _weights(weights, y.shape[1])  # (n, k)
    return terms.amax(1) + rho * terms.sum(1)


def chebyshev_weights(
    target: Tensor,  # (k,) the Pareto-optimal alternative that is to be the minimiser
    reference: Sequence[float] | Tensor,  # (k,) strictly below it
) -> Tensor:
    """w_i = 1 / (y_i - z_i), (k,): with these weights ``target`` minimises ``chebyshev``. Raises: DataError, ConfigError."""
    y = _objectives(target[None])
    return 1.0 / (y - _reference(reference, y))[0]


def pareto_front(objectives: Tensor) -> Tensor:  # (n, k) -> (n,)
    """Which alternatives no other one dominates (no worse in every objective, better in one); equal alternatives keep each other."""
    y = _objectives(objectives)
    no_worse = (y[:, None] <= y[None]).all(-1)  # (n, n): row no worse than column
    better = (y[:, None] < y[None]).any(-1)
    return ~(no_worse & better).any(0)


def _objectives(objectives: Tensor) -> Tensor:
    if objectives.ndim != 2 or 0 in objectives.shape:
        raise DataError(f"objectives have shape {tuple(objectives.shape)}: (alternatives, objectives) is needed, at least 1 x 1")
    y = objectives.double()
    if not torch.isfinite(y).all():
        raise DataError("objectives hold NaN or infinity: every objective of every alternative must be finite")
    return y


def _weights(weights: Sequence[float] | Tensor, count: int) -> Tensor:
    w = torch.as_tensor(weights, dtype=torch.float64)
    if w.shape != (count,) or not torch.isfinite(w).all() or (w < 0).any() or not (w > 0).any():
        raise ConfigError.of("weights", w.tolist(), f"{count} finite numbers >= 0, not all zero")
    return w


def _reference(reference: Sequence[float] | Tensor, y: Tensor) -> Tensor:
    z = torch.as_tensor(reference, dtype=torch.float64)
    if z.shape != (y.shape[1],) or not (z < y.amin(0)).all():
        raise ConfigError.of("reference", z.tolist(), f"a point strictly below the ideal point {y.amin(0).tolist()}")
    return z

"""Distributed problems with exact constants, on which T5-T7 and the PEPit certificates measure mango.feedback. Everything in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from mango.errors import MissingExtra

try:
    from scipy.optimize import minimize
    from sklearn.datasets import load_breast_cancer
except ImportError as error:
    raise MissingExtra.of("scikit-learn and scipy", "theory", "the logistic task") from error


@dataclass(frozen=True)
class Logistic:
    """f_i(x) = (1/m) sum_j log(1 + exp(-y_ij <a_ij, x>)) + lam sum_k x_k^2 / (1 + x_k^2), f = (1/n) sum_i f_i.

    The regulariser's second derivative 2 (1 - 3x^2) / (1 + x^2)^3 lies in [-1/2, 2] and the logistic loss's in (0, 1/4], both with their
    largest value at x = 0, so the smoothness constants below are the Hessians' norms at 0: exact, not bounds.

    Attributes:
        features: (n, m, d).
        labels: (n, m), -1 or 1.
        lam: weight of the nonconvex regulariser.
    """

    features: Tensor
    labels: Tensor
    lam: float

    @property
    def workers(self) -> int:
        return self.features.shape[0]

    @property
    def dim(self) -> int:
        return self.features.shape[2]

    def value(self, x: Tensor) -> float:
        """f(x) for x of shape (d,)."""
        margins = self.labels * (self.features @ x)  # (n, m)
        return float(torch.nn.functional.softplus(-margins).mean() + self.lam * (x**2 / (1 + x**2)).sum())

    def gradients(self, x: Tensor) -> Tensor:
        """(n, d): each worker's gradient at x."""
        weights = -self.labels * torch.sigmoid(-self.labels * (self.features @ x))  # (n, m)
        return torch.einsum("nm,nmd->nd", weights, self.features) / weights.shape[1] + self._regulariser(x)

    def sampled(self, x: Tensor, index: Tensor) -> Tensor:
        """(n, d): each worker's gradient on the minibatch ``index`` (n, b) of its samples."""
        rows = self.features.gather(1, index[:, :, None].expand(-1, -1, self.dim))  # (n, b, d)
        y = self.labels.gather(1, index)
        weights = -y * torch.sigmoid(-y * (rows @ x))
        return torch.einsum("nb,nbd->nd", weights, rows) / index.shape[1] + self._regulariser(x)

    def gradient(self, x: Tensor) -> Tensor:
        """(d,): the gradient of f."""
        return self.gradients(x).mean(0)

    @cached_property
    def L(self) -> float:
        """Smoothness of f."""
        return self._smoothness(self.features.reshape(-1, self.dim))

    @cached_property
    def L_workers(self) -> list[float]:
        """Smoothness of each f_i."""
        return [self._smoothness(rows) for rows in self.features]

    @property
    def L_tilde(self) -> float:
        """Root mean square of the workers' constants."""
        return sqrt(sum(value**2 for value in self.L_workers) / self.workers)

    @cached_property
    def sample_variance(self) -> float:
        """calL^2, a bound: the mean over workers of the variance of one sample's gradient difference is at most this times |x - y|^2.

        A sample's difference is a_j times a number below |<a_j, x - y>| / 4, so its mean square is at most the form of
        mean |a_j|^2 a_j a_j^T / 16; the regulariser's part is the same for all samples.
        """
        norms = self.features.square().sum(-1)  # (n, m)
        forms = torch.einsum("nm,nmd,nme->nde", norms, self.features, self.features) / (16 * norms.shape[1])
        return float(torch.linalg.eigvalsh(forms.mean(0))[-1])

    @cached_property
    def infimum(self) -> float:
        """The least value found by L-BFGS from 0, no less than inf f: bounds that use it are only made smaller by its error."""
        import numpy as np

        def objective(x: Any) -> tuple[float, Any]:
            point = torch.from_numpy(np.asarray(x, dtype=np.float64))
            return self.value(point), self.gradient(point).numpy()

        found = minimize(objective, np.zeros(self.dim), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 0, "gtol": 1e-10})
        return float(found.fun)

    def _regulariser(self, x: Tensor) -> Tensor:
        return 2 * self.lam * x / (1 + x**2) ** 2

    def _smoothness(self, rows: Tensor) -> float:
        return float(torch.linalg.eigvalsh(rows.T @ rows)[-1]) / (4 * len(rows)) + 2 * self.lam


@lru_cache(maxsize=4)
def breast_cancer(workers: int = 8, lam: float = 0.1, homogeneous: bool = False) -> Logistic:
    """scikit-learn's breast-cancer set (569 x 30, standardised), the first samples dealt out evenly in the file's order.

    Args:
        homogeneous: every worker holds all the samples instead of its share, so that the workers' functions are equal.
    """
    data = load_breast_cancer()
    features = torch.from_numpy(data.data).double()
    features = (features - features.mean(0)) / features.std(0, correction=0)
    labels = torch.from_numpy(data.target).double() * 2 - 1
    share = len(labels) // workers
    features, labels = features[: share * workers], labels[: share * workers]
    if homogeneous:
        return Logistic(features.expand(workers, -1, -1), labels.expand(workers, -1), lam)
    return Logistic(features.reshape(workers, share, -1), labels.reshape(workers, share), lam)


def descend(
    gradients: Callable[[Tensor], Tensor],  # x -> (n, d), the workers' gradients
    estimate: Callable[[Tensor], Tensor],  # (n, d) -> (d,), a round of the method
    x: Tensor,
    gamma: float,
    steps: int,
) -> tuple[list[float], list[float], Tensor]:
    """x <- x - gamma g from x. Returns |grad f(x_t)|^2 and zeta_t^2 = mean |grad f_i - grad f|^2 for t < steps, and the last x."""
    squared, spread = [], []
    for _ in range(steps):
        rows = gradients(x)
        mean = rows.mean(0)
        squared.append(float(mean.square().sum()))
        spread.append(float((rows - mean).square().sum(1).mean()))
        x = x - gamma * estimate(rows)
    return squared, spread, x


@dataclass(frozen=True)
class ThreeWorkers:
    """f_i(x) = <a_i, x>^2 + |x|^2 / 4 with a_i = (2, 2, 2) - 5 e_i: strongly convex, and top-1 without feedback diverges from (b, b, b).

    Source: Beznosikov, Horváth, Richtárik, Safaryan 2020, arXiv:2002.12410, example 1.
    """

    L: float = 103 / 6  # 2 * 25 / 3 + 1/2: sum a_i a_i^T has the eigenvalues 25, 25, 1
    L_tilde: float = 69 / 2  # 2 * 17 + 1/2, the same for all three
    mu: float = 7 / 6  # 2 * 1 / 3 + 1/2

    @property
    def vectors(self) -> Tensor:
        return 2 - 5 * torch.eye(3, dtype=torch.float64)  # (3, 3), a row each

    def value(self, x: Tensor) -> float:
        return float((self.vectors @ x).square().mean() + x.square().sum() / 4)

    def gradients(self, x: Tensor) -> Tensor:
        """(3, 3): a row for each worker."""
        return 2 * (self.vectors @ x)[:, None] * self.vectors + x / 2


@dataclass(frozen=True)
class FiniteSum:
    """f_i(x) = (1/m) sum_j (h_ij / 2) (<a_ij, x> - b_ij)^2 with small integers: few enough draws to enumerate.

    Attributes:
        vectors: (n, m, d); curvatures, offsets: (n, m).
    """

    vectors: Tensor
    curvatures: Tensor
    offsets: Tensor

    def samples(self, x: Tensor) -> Tensor:
        """(n, m, d): the gradient of every sample."""
        return (self.curvatures * (self.vectors @ x - self.offsets))[:, :, None] * self.vectors

    def gradients(self, x: Tensor) -> Tensor:
        """(n, d)."""
        return self.samples(x).mean(1)


def finite_sum(workers: int, samples: int, dim: int, seed: int) -> FiniteSum:
    """A random instance with entries in {-2, ..., 2}."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    return FiniteSum(integers(-2, 2, workers, samples, dim), integers(1, 3, workers, samples), integers(-2, 2, workers, samples))

"""The constants of theorems T5-T7 as plain functions of the certificates: step sizes, recursions, admission of a quantised state.

Symbols: alpha = contraction of the compressor, q = sqrt(1 - alpha), omega = variance of an unbiased one, L = smoothness of the mean of the
workers' functions, L_tilde = root mean square of the workers' own constants. Proofs: theory/t5_ef21.py, t6_marina.py, t7_adaptive.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt

from mango.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EF21Rate:
    """E G+ <= (1 - theta) E G + beta L_tilde^2 E|x+ - x|^2, with G the mean squared distance of the workers' states to their gradients."""

    theta: float
    beta: float

    def step(self, L: float, L_tilde: float, *, pl: bool = False) -> float:
        """Largest step size of T5; under the Polyak-Lojasiewicz inequality (``pl``) also at most theta / (2 mu)."""
        return 1.0 / (L + L_tilde * sqrt((2.0 if pl else 1.0) * self.beta / self.theta))


def ef21(alpha: float) -> EF21Rate:
    """theta = 1 - q, beta = (1 - alpha) / (1 - q)."""
    if not 0.0 < alpha <= 1.0:
        raise ConfigError.of("alpha", alpha, "in (0, 1]: EF21 needs a contractive compressor")
    q = sqrt(1.0 - alpha)
    return EF21Rate(theta=1.0 - q, beta=(1.0 - alpha) / (1.0 - q))


@dataclass(frozen=True, slots=True)
class QuantisedState:
    """EF21 whose state is rounded with relative error rho after each step: D+ <= a (D + L|x+ - x|) + rho |grad+|."""

    a: float
    kappa: float

    @property
    def admissible(self) -> bool:
        """T5's condition: the recursion contracts and the floor that rounding leaves is below the gradient itself."""
        return self.a < 1.0 and self.kappa < 1.0

    def step(self, L: float, L_tilde: float) -> float:
        """Largest step size of T5 for an admissible state."""
        return 1.0 / (L + L_tilde * sqrt(2.0) * self.a / (1.0 - self.a))


def quantised_state(alpha: float, rho: float) -> QuantisedState:
    """a = (1 + rho) sqrt(1 - alpha) and kappa = 2 rho^2 / (1 - a)^2 (infinite when a >= 1)."""
    a = (1.0 + rho) * sqrt(1.0 - alpha)
    return QuantisedState(a=a, kappa=2.0 * rho**2 / (1.0 - a) ** 2 if a < 1.0 else inf)


@dataclass(frozen=True, slots=True)
class Schedule:
    """T7 for contractions alpha_0 ... alpha_{T-1} known in advance: w_t = 1 + (1 - theta_t) w_{t+1}, S = max beta_t w_{t+1}."""

    S: float
    w0: float

    def step(self, L: float, L_tilde: float) -> float:
        """Largest step size of T7."""
        return 1.0 / (L + L_tilde * sqrt(self.S))


def schedule(alphas: Sequence[float]) -> Schedule:
    """Constants of a time-varying plan; the t-th contraction acts between the t-th and the next iterate."""
    if not alphas:
        raise ConfigError.of("alphas", list(alphas), "one contraction per step, at least one")
    S = w = 0.0
    for alpha in reversed(alphas):
        rate = ef21(alpha)
        S = max(S, rate.beta * w)
        w = 1.0 + (1.0 - rate.theta) * w
    return Schedule(S=S, w0=w)


def marina(omega: float, probability: float, workers: int, L_tilde: float, variance: float = 0.0) -> float:
    """A of T6 for (VR-)MARINA; the step size is 1 / (L + sqrt(A / p)).

    ``variance`` = calL^2 / b', the variance bound of a minibatch gradient difference over |x+ - x|^2; 0 for MARINA's full gradients.
    """
    return (1.0 - probability) / workers * (omega * L_tilde**2 + (1.0 + omega) * variance)


def byzantine(
    omega: float,
    probability: float,
    good: int,  # honest workers, at least 2
    c_delta: float,  # c * delta of the robust aggregator
    L_tilde: float,
    variance: float = 0.0,
    hessian_variance: float = 0.0,  # L+-^2: mean |D_i - D|^2 <= L+-^2 |x+ - x|^2 for the honest gradient differences D_i with mean D
) -> float:
    """A' of T6 for Byz-VR-MARINA; the step size is 1 / (L + sqrt(A'))."""
    p = probability
    V = omega * L_tilde**2 + (1.0 + omega) * variance
    pairwise = 2.0 * V + 2.0 * good * hessian_variance / (good - 1)
    return 2.0 / p * (1.0 - p) * ((1.0 + p / 2.0) * V / good + (1.0 + 2.0 / p) * c_delta * pairwise)

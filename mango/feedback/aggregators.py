"""Averages that a minority of attackers cannot move far.

Every aggregator declares (delta, c): with at most f = floor(delta n) attackers among n workers and any honest messages x_i (G = n - f of
them, mean x_bar), E|x_hat - x_bar|^2 <= c delta sigma^2 where sigma^2 = (1 / (G (G - 1))) sum E|x_i - x_l|^2 over honest pairs. It is
agnostic: sigma is not an input. The constants come from ``kappa``: |x_hat - x_bar|^2 <= kappa v with v = (1/G) sum |x_i - x_bar|^2, hence
c delta = kappa (G - 1) / (2 G). Proofs: theory/t6_marina.py; where they sharpen the literature's constants the class says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import floor, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from mango.errors import ConfigError, NonFinite
from mango.registry import Registry

REGISTRY = Registry(
    "aggregator",
    {
        "mean": "mango.feedback.aggregators:Mean",
        "median": "mango.feedback.aggregators:CoordinateMedian",
        "trimmed": "mango.feedback.aggregators:TrimmedMean",
        "krum": "mango.feedback.aggregators:Krum",
        "rfa": "mango.feedback.aggregators:RFA",
        "clipping": "mango.feedback.aggregators:CentredClipping",
    },
)
get = REGISTRY.get


class Aggregator(ABC):
    """Args:
        delta: fraction of the workers that may be attackers, 0 <= delta < 1/2.
        bucket: messages are shuffled and averaged in buckets of this many first (arXiv:2006.09365), which divides the honest variance by
            it and multiplies the attackers' share by at most as much: bucket * delta < 1/2. 1 = no buckets.

    Attributes:
        dropped: messages with NaN, infinity or a squared norm beyond float64, left out so far; each counts as one of the attackers.
    """

    name: ClassVar[str]
    robust: ClassVar[bool] = True

    def __init__(self, delta: float = 0.25, bucket: int = 1) -> None:
        if not 0.0 <= delta < 0.5:
            raise ConfigError.of("delta", delta, "0 <= delta < 1/2: no aggregator withstands a majority of attackers")
        if bucket < 1:
            raise ConfigError.of("bucket", bucket, "an integer >= 1")
        self.delta = delta
        self.bucket = bucket
        self.dropped = 0

    def __call__(self, messages: Tensor | Sequence[Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        """Aggregate n messages, given as (n, ...) or as n tensors of one shape; returns one tensor of that shape.

        Args:
            generator: draws the buckets; on the messages' device. Not used when ``bucket`` is 1.

        Raises:
            ConfigError: shapes differ, the generator is on another device, or attackers could fill half of the buckets.
            NonFinite: half of the messages or more are not finite.
        """
        stacked = _stack(messages)
        if generator is not None and generator.device.type != stacked.device.type:
            raise ConfigError.of("generator.device", str(generator.device), f"the messages' device, {stacked.device}")
        rows = stacked.reshape(len(stacked), -1)  # (n, d)
        return self._robustly(rows, generator).reshape(stacked.shape[1:])

    def kappa(self, workers: int, attackers: int) -> float | None:
        """Bound of |x_hat - x_bar|^2 / v over every honest and hostile input, ``attackers < workers / 2``; None when none is known."""
        if self.bucket == 1:
            return self._kappa(workers, attackers)
        buckets, size = workers // self.bucket, self.bucket
        if workers % size or 2 * attackers >= buckets:
            return None  # a last, smaller bucket weighs its messages more: no constant is claimed
        inner = self._kappa(buckets, attackers)
        if inner is None:
            return None
        # buckets - attackers honest buckets hold ``kept`` honest messages, drawn without replacement from the ``good``
        good, kept = workers - attackers, (buckets - attackers) * size
        spread = inner / size * (good - size) / (good - 1)  # variance of the buckets' means
        shift = (good - kept) / (kept * (good - 1))  # of the kept messages' mean
        return (sqrt(spread) + sqrt(shift)) ** 2

    def certificate(self, workers: int) -> tuple[float, float] | None:
        """(delta, c) for this many workers, delta = f / n; None when no finite c is known."""
        attackers = self.attackers(workers)
        kappa = self.kappa(workers, attackers)
        if attackers == 0:
            return (0.0, 0.0) if kappa == 0.0 else None  # c * 0 can bound nothing but 0
        if kappa is None:
            return None
        good = workers - attackers
        delta = attackers / workers
        return delta, kappa * (good - 1) / (2 * good * delta)

    def attackers(self, workers: int) -> int:
        """f = floor(delta n)."""
        return floor(self.delta * workers + 1e-9)

    @abstractmethod
    def _kappa(self, n: int, f: int) -> float | None: ...

    @abstractmethod
    def _combine(self, rows: Tensor, f: int) -> Tensor:
        """(n, d) finite messages, f < n / 2 of them hostile -> (d,)."""

    def _robustly(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        f = self.attackers(len(rows))
        finite = torch.isfinite(_norms(rows).square())
        lost = len(rows) - int(finite.sum())
        if lost:
            if 2 * lost >= len(rows):
                raise NonFinite(f"{lost} of {len(rows)} messages are not finite: no honest majority is left")
            self.dropped += lost
            rows, f = rows[finite], max(0, f - lost)
        if self.bucket > 1:
            order = torch.randperm(len(rows), generator=generator, device=rows.device)
            rows = torch.stack([chunk.mean(0) for chunk in rows[order].split(self.bucket)])
        if 2 * f >= len(rows):
            raise ConfigError.of("bucket", self.bucket, f"bucket * delta < 1/2: {f} attackers could spoil half of the {len(rows)} buckets")
        return self._combine(rows, f)


class Mean(Aggregator):
    """The plain mean: exact without attackers, at the mercy of a single one (NaN included). ``delta`` and ``bucket`` have no effect."""

    name: ClassVar[str] = "mean"
    robust: ClassVar[bool] = False

    def kappa(self, workers: int, attackers: int) -> float | None:
        return self._kappa(workers, attackers)

    def _kappa(self, n: int, f: int) -> float | None:
        return 0.0 if f == 0 else None

    def _combine(self, rows: Tensor, f: int) -> Tensor:
        return rows.mean(0)

    def _robustly(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        return rows.mean(0)


class TrimmedMean(Aggregator):
    """Per coordinate, the mean without the f smallest and f largest values.

    kappa = f / (n - 2f), derived here: the k-th kept value lies between the honest values of ranks k - f and k. It equals the lower bound
    for every aggregator in Allouah et al. 2023 (arXiv:2302.01772), so no aggregator has a better constant.
    Source: Yin et al. 2018, arXiv:1803.01498.
    """

    name: ClassVar[str] = "trimmed"

    def _kappa(self, n: int, f: int) -> float:
        return f / (n - 2 * f)

    def _combine(self, rows: Tensor, f: int) -> Tensor:
        return _trimmed(rows, f)


class CoordinateMedian(Aggregator):
    """Per coordinate, the median (the midpoint of the middle two for an even number).

    It trims b = ceil(n/2) - 1 values on each side, whence kappa = b / (n - f - b) (derived here).
    Source: Yin et al. 2018, arXiv:1803.01498.
    """

    name: ClassVar[str] = "median"

    def _kappa(self, n: int, f: int) -> float:
        b = (n - 1) // 2
        return b / (n - f - b)

    def _combine(self, rows: Tensor, f: int) -> Tensor:
        return _trimmed(rows, (len(rows) - 1) // 2)


class Krum(Aggregator):
    """The message with the least sum of squared distances to its n - f - 1 nearest others.

    With m = n - 2f and G = n - f: kappa = (sqrt(2G/m) + sqrt(f/m))^2 (derived here). It does not vanish with f: one message is noisier than
    a mean of many. Source: Blanchard et al. 2017, arXiv:1703.02757, who sum over n - f - 2 neighbours; one more gives the better constant
    and every f < n/2.
    """

    name: ClassVar[str] = "krum"

    def _kappa(self, n: int, f: int) -> float:
        m = n - 2 * f
        return (sqrt(2 * (n - f) / m) + sqrt(f / m)) ** 2

    def _combine(self, rows: Tensor, f: int) -> Tensor:
        # not by the Gram matrix: near the optimum the messages agree to many digits
        squared = torch.stack([_norms(rows - row).square() for row in rows])  # (n, n)
        nearest = squared.sort(dim=1).values[:, : len(rows) - f]  # the first is the message itself, at distance 0
        return rows[nearest.sum(1).argmin()].clone()


class RFA(Aggregator):
    """Geometric median by smoothed Weiszfeld iterations: argmin over z of sum_i sqrt(|x_i - z|^2 + nu^2).

    kappa = 4 (G / (G - f))^2 with G = n - f, for the exact median (Allouah et al. 2023, arXiv:2302.01772).
    Source: Pillutla, Kakade, Harchaoui 2019, arXiv:1912.13445. Started at the coordinate-wise median instead of the mean, so that a far
    outlier costs no iterations, with nu relative to the median distance from there.

    Args:
        iterations: at most this many; stops when a step is below 1e-6 of the median distance.
        smoothing: nu over the median distance.
    """

    name: ClassVar[str] = "rfa"

    def __init__(self, delta: float = 0.25, bucket: int = 1, *, iterations: int = 32, smoothing: float = 1e-6) -> None:
        super().__init__(delta, bucket)
        if iterations < 1:
            raise ConfigError.of("iterations", iterations, "an integer >= 1")
        if not smoothing > 0.0:
            raise ConfigError.of("smoothing", smoothing, "> 0")
        self.iterations = iterations
        self.smoothing = smoothing

    def _kappa(self, n: int, f: int) -> float:
        return 4.0 * ((n - f) / (n - 2 * f)) ** 2

    def _combine(self, rows: Tensor, f: int) -> Tensor:
        z = _trimmed(rows, (len(rows) - 1) // 2)
        scale = _norms(rows - z).median()
        if scale == 0.0:
            return z  # at least half of the messages are z: it is a geometric median
        for _ in range(self.iterations):
            weights = (_norms(rows - z).square() + (self.smoothing * scale) ** 2).rsqrt()
            moved = ((weights / weights.sum()).to(rows.dtype)[:, None] * rows).sum(0)
            step = torch.linalg.vector_norm(moved - z, dtype=torch.float64)
            z = moved
            if step <= 1e-6 * scale:
                break
        return z


class CentredClipping(Aggregator):
    """One step of centred clipping: x_hat = v + mean_i clip(x_i - v, tau), started at the coordinate-wise median v.

    With ``radius=None`` tau is the median of the distances |x_i - v|, so no scale has to be known; then, with k = ceil(n/2) and kappa_v
    that of the median, kappa = (sqrt(kappa_v) + sqrt(G (1 + kappa_v) / (n - k + 1 - f)))^2 (derived here). A fixed radius has no constant.
    Source: Karimireddy, He, Jaggi 2021, arXiv:2012.10333, who start at the previous aggregate and fix tau.

    Args:
        radius: tau, > 0, in the messages' units; None = from the messages.
    """

    name: ClassVar[str] = "clipping"

    def __init__(self, delta: float = 0.25, bucket: int = 1, *, radius: float | None = None) -> None:
        super().__init__(delta, bucket)
        if radius is not None and not radius > 0.0:
            raise ConfigError.of("radius", radius, "> 0, or None to take it from the messages")
        self.radius = radius

    def _kappa(self, n: int, f: int) -> float | None:
        if self.radius is not None:
            return None
        b = (n - 1) // 2
        start = b / (n - f - b)
        far = n - (n + 1) // 2 + 1 - f  # honest messages at tau or beyond, at least
        return (sqrt(start) + sqrt((n - f) * (1.0 + start) / far)) ** 2

    def _combine(self, rows: Tensor, f: int) -> Tensor:
        centre = _trimmed(rows, (len(rows) - 1) // 2)
        offsets = rows - centre
        distances = _norms(offsets)
        radius = distances.median() if self.radius is None else torch.full_like(distances[0], self.radius)
        scale = torch.where(distances > radius, radius / distances, torch.ones_like(distances))
        return centre + (scale.to(rows.dtype)[:, None] * offsets).mean(0)


def _stack(messages: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(messages, Tensor):
        for worker, message in enumerate(messages):
            if message.shape != messages[0].shape:
                raise ConfigError.of(f"shape of worker {worker}", tuple(message.shape), f"that of worker 0, {tuple(messages[0].shape)}")
        messages = torch.stack(list(messages)) if len(messages) else torch.empty(0)
    if messages.ndim == 0 or len(messages) == 0:
        raise ConfigError.of("messages", tuple(messages.shape), "(n, ...) with n >= 1 workers")
    return messages


def _norms(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, summed in float64: hostile messages must not overflow."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _trimmed(rows: Tensor, trim: int) -> Tensor:
    """Per coordinate, the mean of the sorted values without ``trim`` at each end."""
    return rows.sort(dim=0).values[trim : len(rows) - trim].mean(0)

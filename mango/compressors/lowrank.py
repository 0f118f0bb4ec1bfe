"""Projection of a matrix on r directions: truncated SVD, a fresh random basis, or a warm-started power step."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from mango.codecs.base import roundoff
from mango.compressors.base import Compressor, check_count, flat_values, folded, resolve_count, saturate
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.orthonormal import orthonormalize
from mango.packed import Packed
from mango.subspace import power_step, scout_alpha

ORTHONORMAL = 2e-5  # twice the bound on ||V'V - I|| that orthonormalize keeps


class LowRank(Compressor):
    """C(G) = V Vᵀ G for the folded G (m, n), V an orthonormal basis of ``rank`` columns on the side of the smaller dimension D = min(m, n).

    =========  ================================================================  ===========================
    method     the basis                                                         alpha (T2, T3)
    =========  ================================================================  ===========================
    ``svd``    leading singular vectors                                          r / D, every time
    ``haar``   fresh and random                                                  r / D, in expectation
    ``power``  one power step from that of the last call on this shape, with     j / (D - r + j) in
               ``scouts`` = j of its columns replaced by random ones before      expectation; 0 without scouts
    =========  ================================================================  ===========================

    The warm basis is a state of this object, one for each shape; the payload holds the basis and the factor VᵀG in float32.

    Args:
        rank: an integer up to D, or a fraction of D (rounded down, at least 1).
        method: as above.
        scouts: j, for ``power`` alone.
        seed: of the draws when no generator is passed.

    Raises:
        ConfigError: for a rank, method or number of scouts that is not legal; a rank above D as soon as the shape is known.
    """

    name = "lowrank"

    def __init__(self, rank: int | float = 1 / 8, method: str = "svd", scouts: int = 0, seed: int = 0) -> None:
        check_count("rank", rank)
        if method not in ("svd", "haar", "power"):
            raise ConfigError.of("method", method, "svd, haar or power")
        check_scouts(scouts, rank)
        if scouts and method != "power":
            raise ConfigError.of("scouts", scouts, f"0 with method={method!r}: scouts belong to the power step")
        self.rank, self.method, self.scouts = rank, method, scouts
        self.directions = Directions(seed)

    def compress(self, x: Tensor, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
        scaled, peak = scaled_matrix(x, generator, name)  # (D, N)
        rank, scouts = self._count(x.shape)
        if self.method == "svd":
            basis = leading_directions(scaled, rank)  # (D, r)
        elif self.method == "haar":
            basis = orthonormalize(self.directions.draw(scaled, rank, generator))
        else:
            basis = self.directions.step(scaled, rank, scouts, generator)
        return Packed(self.name, x.shape, x.dtype, {"basis": basis, "factor": (basis.mT @ scaled) * peak})

    def decompress(self, packed: Packed) -> Tensor:
        self.check_kind(packed)
        basis, factor = packed.tensors()
        return unfold(basis @ factor, packed)

    def alpha(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> float:
        rank, scouts = self._count(shape)
        dim = min(folded(shape))
        if dim == 0:
            return 1.0
        return projected_alpha(scout_alpha(dim, rank, scouts) if self.method == "power" else rank / dim, 1.0, dtype)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        return 4 * self._count(shape)[0] * sum(folded(shape))

    def _count(self, shape: Sequence[int]) -> tuple[int, int]:
        return rank_and_scouts(self.rank, self.scouts, shape)


class Directions:
    """Where bases come from: random draws, and the warm basis of each shape."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.draws = 0
        self.warm: dict[tuple[int, int, torch.device], Tensor] = {}

    def draw(self, g: Tensor, columns: int, generator: torch.Generator | None) -> Tensor:
        """Gaussian (D, columns), fresh at every call."""
        if generator is not None:
            return torch.randn(g.shape[0], columns, generator=generator, device=g.device, dtype=torch.float32)
        self.draws += 1
        return gaussian((g.shape[0], columns), (self.seed, self.draws), g.device)

    def step(self, g: Tensor, rank: int, scouts: int, generator: torch.Generator | None) -> Tensor:
        """The basis (D, rank) of this shape after one power step on g (D, N), scouts replaced before it."""
        key = (*g.shape, g.device)
        before = self.warm.get(key)
        if before is None or before.shape[1] != rank:
            before = orthonormalize(self.draw(g, rank, generator))
        self.warm[key], _ = power_step(before, g, self.draw(g, scouts, generator) if scouts else None)
        return self.warm[key]


def check_scouts(scouts: int, rank: int | float) -> None:
    if isinstance(scouts, bool) or not isinstance(scouts, int) or scouts < 0 or (isinstance(rank, int) and scouts > rank):
        raise ConfigError.of("scouts", scouts, "an integer from 0 to the rank")


def rank_and_scouts(rank: int | float, scouts: int, shape: Sequence[int]) -> tuple[int, int]:
    """Both for this shape. A fraction may come out below the number of scouts: the whole basis is then scouts."""
    rows, columns = folded(shape)
    found = resolve_count("rank", rank, min(rows, columns), f"the smaller dimension of shape {tuple(shape)} folded to {(rows, columns)}")
    return found, min(scouts, found)


def scaled_matrix(x: Tensor, generator: torch.Generator | None, name: str) -> tuple[Tensor, Tensor]:
    """The folded x, transposed if it is tall, in float32 and divided by its largest magnitude, (D, N); and that magnitude, ().

    Squares of the raw entries would leave the range of float32 beyond 1e19.
    """
    matrix = flat_values(x, generator, name).view(folded(x.shape)).to(torch.float32)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    peak = matrix.abs().amax() if matrix.numel() else matrix.new_ones(())
    peak = torch.where(peak > 0, peak, 1.0)
    return matrix / peak, peak


def unfold(matrix: Tensor, packed: Packed) -> Tensor:
    """The inverse of ``scaled_matrix``'s folding for the (D, N) result."""
    rows, columns = folded(packed.shape)
    return saturate(matrix if rows <= columns else matrix.mT, packed.dtype).reshape(packed.shape)


def leading_directions(g: Tensor, rank: int) -> Tensor:
    """Left singular vectors of g (D, N) for its largest singular values, (D, rank).

    From the Gram matrix in float64: no iteration that may fail to converge, and energies are good to 1e-15 of the total.
    """
    if g.shape[0] == 0:
        return g.new_zeros(0, rank)
    wide = g.to(torch.float64)
    vectors = torch.linalg.eigh(wide @ wide.mT).eigenvectors  # ascending
    return vectors[:, g.shape[0] - rank :].flip(1).to(torch.float32).contiguous()


def projected_alpha(basis_alpha: float, factor_alpha: float, dtype: torch.dtype) -> float:
    r"""T4: alpha_r * alpha_q for a projection whose factor passes a quantiser, less rounding of the result to dtype. Derived here.

    With b the captured share of the energy, the error before rounding is at most 1 - b a (a = alpha_q), the result at most
    c sqrt(b), c = 1 + sqrt(1-a), and rounding adds at most u c sqrt(b): the squared error is at most
    f(b) = 1 - b a + 2 u c sqrt(b (1 - b a)) + u^2 c^2 b, which is concave, so E f(b) <= f(E b) with E b in [alpha_r, 1]. Where f falls at
    alpha_r it falls up to 1 and f(alpha_r) is the bound; else nothing is certified.
    """
    a = factor_alpha
    b = basis_alpha * (1 - ORTHONORMAL)
    if a <= 0 or b <= 0:
        return 0.0
    uc = max(roundoff(dtype), 2.0**-23) * (1 + sqrt(1 - a))
    root = sqrt(b * (1 - b * a))
    slope = -a + uc * uc + uc * (1 - 2 * b * a) / root
    return max(0.0, b * a - 2 * uc * root - uc * uc * b) if slope <= 0 else 0.0

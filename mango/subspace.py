"""The tracked orthonormal basis of a gradient: warm-started block power steps, fresh scout columns, rotation of moments.

One full power step V <- orth(G Gᵀ [V, S]) is two matrix products with G. S holds j fresh Gaussian columns: by T3 they give the
step the worst-case contraction j / (dim - rank + j), which a warm start alone does not have, because a direction that the old
basis misses may stay invisible to it for ever. Column order carries meaning: the basis leaves a step sorted by captured energy,
so the scouts of the next step replace the weakest columns, and a scout that found something stays.

Source: block power step with warm start, PowerSGD (arXiv:1905.13727); the scouts are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mango.draws import gaussian
from mango.errors import ConfigError
from mango.orthonormal import cholesky_qr, orthonormalize
from mango.products import ByteMatrices, matmul

Matrix = Tensor | ByteMatrices  # G (…, dim, n)
Operator = Matrix | Callable[[Tensor], Tensor]  # G, or X (…, dim, k) -> G Gᵀ X (…, dim, k)


def power_step(
    basis: Tensor,  # (…, dim, k) V: columns nearly orthonormal, strongest first
    g: Operator,  # G (…, dim, n), or X -> G Gᵀ X
    scouts: Tensor | None = None,  # (…, dim, j) Gaussian, drawn after G was known; they replace the last j columns of V
    damping: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One warm-started block power step, V <- orth(G Gᵀ [V, S]), sorted by the energy that each column captures.

    The certificate of T3 needs only that S is Gaussian given (V, G): the span of [V, S] is that of V and S projected on V's
    complement. The projection is still carried out, for conditioning.

    Where G is part of a larger matrix, all of the basis would turn to that part. With ``damping`` d the rest is taken to have d times the
    energy of G along each column of V and to leave these where they are: V <- orth(G Gᵀ [V, S] + d [V diag(‖vᵀG‖²), 0]). T3 covers it.

    Returns:
        The new basis (…, dim, k) in float32 (float64 for float64 input; for a bfloat16 G to its precision), and an estimate of each
        column's captured energy ‖vᵢᵀG‖², (…, k), descending. The estimate is the ratio of successive moments ‖GGᵀq‖² / ‖Gᵀq‖², with the
        step's mean of G Gᵀq and q in the place of the former where it is damped: a lower bound for what a single column captures after
        its power step, and exact for a singular vector.
    """
    kept = basis.shape[-1]
    q = basis.to(torch.float64 if basis.dtype == torch.float64 else torch.float32)
    if scouts is not None and scouts.shape[-1]:
        fresh, kept = scouts.to(q.dtype), kept - scouts.shape[-1]
        # (…, j, k), from this side, of all columns: products with a few columns on the right, or with some of q, copy the whole of it
        inside = fresh.mT @ q
        inside[..., kept:] = 0.0
        fresh = fresh - (inside @ q.mT).mT
        fresh = fresh / torch.linalg.vector_norm(fresh, dim=-2, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
        q = torch.cat([q[..., :kept], fresh], dim=-1)
    if isinstance(g, ByteMatrices):
        y, norm, size = _forward(g, g.left(q.mT).mT)
    elif isinstance(g, Tensor):
        g = g if g.dtype == torch.bfloat16 else g.to(q.dtype)
        y, norm, size = _forward(g, matmul(g.mT, q.to(g.dtype)))
    else:
        y = g(q).to(q.dtype)  # (…, dim, k)
        norm = size = (q * y).sum(dim=-2).clamp_min(torch.finfo(q.dtype).tiny).sqrt()
    if damping:
        rest = torch.full_like(norm, damping)
        rest[..., kept:] = 0.0
        y, size = torch.addcmul(y.to(q.dtype), q, (rest * norm * size).unsqueeze(-2)), size * (1.0 + rest)
    return cholesky_qr(y, size, _is_rough(g))


def _forward(g: Matrix, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G Z diag(size / norm), (…, dim, k), for Z (…, n, k), the norms of the columns of Z, and what these are in the product, (…, k)."""
    exact = torch.float64 if z.dtype == torch.float64 else torch.float32
    norm = z.to(exact).square().sum(dim=-2).sqrt_().clamp_min(torch.finfo(exact).tiny)  # a norm would take ten times as long on a CPU
    if not isinstance(g, Tensor):
        return g.right(z.mT, norm).mT, norm, torch.ones_like(norm)
    if g.dtype == torch.bfloat16:
        scale = torch.exp2(-norm.log2().floor())  # (…, k): powers of two change no digit
        return matmul(g, z.to(g.dtype) * scale.unsqueeze(-2).to(g.dtype)), norm, norm * scale
    return matmul(g, (z / norm.unsqueeze(-2)).to(g.dtype)), norm, torch.ones_like(norm)


def _is_rough(g: Operator) -> bool:
    """Whether products with G are rounded as bfloat16 is, or further."""
    return isinstance(g, ByteMatrices) or (isinstance(g, Tensor) and g.dtype == torch.bfloat16)


def half_step(
    g: Matrix,  # G (…, dim, n)
    start: Tensor,  # Z (…, k, n): rows, strongest first; the last j of them Gaussian, drawn after G and the others were known
) -> Tensor:
    """Half a power step from the right, V <- orth(G Zᵀ), sorted by what each column adds: one product with G where ``power_step`` has two.

    PowerSGD (arXiv:1905.13727) starts from the factor of the step before, Z = VᵀG; Mango starts from its momentum. With j Gaussian rows
    E‖G - VVᵀG‖² <= (1 - j / dim) ‖G‖² whatever the other rows are (T3): j in the place of j / (dim - k + j), because a start that G
    maps to zero may waste the other columns.

    Returns:
        The new basis (…, dim, k) in float32 (float64 for float64 input).
    """
    y, _, size = _forward(g, start.mT)
    return cholesky_qr(y, size, _is_rough(g))[0]


def rotation(new: Tensor, old: Tensor) -> Tensor:
    """R = V_newᵀ V_old (…, k_new, k_old): coordinates U in the old basis become R U in the new one."""
    return matmul(new.mT, old.to(new.dtype))


def rotate_moments(r: Tensor, m: Tensor, v: Tensor, out: Sequence[Tensor | None] = (None, None)) -> tuple[Tensor, Tensor]:
    """Adam's moments of U carried from one basis to another.

    The first moment is linear in U, so m' = R m is exact on the span of the new basis. For the second,
    E[(R u)ᵢ²] = Σⱼₗ Rᵢⱼ Rᵢₗ E[uⱼ uₗ]. Taking the coordinates as uncorrelated (they nearly are in a basis of singular directions)
    leaves v' = (R ∘ R) v, which is non-negative and exact when R is a permutation with signs.
    LDAdam (arXiv:2410.16103) treats only the *centred* coordinates as uncorrelated, (R∘R)(v - m²) + (R m)²; we depart from it because
    with a noisy gradient m² is small beside v and the difference then only adds cancellation.

    Args:
        r: (…, k', k); m, v: (…, k, n); out: where m' and v' are written, (…, k', n).
    """
    return matmul(r, m, out[0]), matmul(r.square(), v, out[1])


def captured_energy(basis: Tensor, g: Tensor) -> Tensor:
    """‖VᵀG‖² / ‖G‖², (…): the fraction of G (…, dim, n) that the basis V (…, dim, k) captures; 1 for a zero G."""
    g = g.to(basis.dtype)
    total = torch.linalg.matrix_norm(g).square()
    return torch.where(total > 0, torch.linalg.matrix_norm(basis.mT @ g).square() / total, 1.0)


def estimate_energy(basis: Tensor, gram: Callable[[Tensor], Tensor], probes: Tensor) -> tuple[Tensor, Tensor]:
    """The captured fraction when only X -> G Gᵀ X is at hand: tr(VᵀGGᵀV) exactly, the rest of tr(GGᵀ) by Hutchinson's estimator.

    Probing the complement alone (Hutch++, arXiv:2010.09649) leaves no variance in what the basis has captured.

    Args:
        basis: (…, dim, k) V.
        gram: X (…, dim, p) -> G Gᵀ X.
        probes: (…, dim, p) independent entries of mean 0 and variance 1 (Gaussian or signs), p >= 2.

    Returns:
        The fraction, (…), and its standard error over the probes (first order in the error of the total), (…).
    """
    p = probes.shape[-1]
    if p < 2:
        raise ConfigError.of("probes.shape[-1]", p, "at least 2, a standard error needs two probes")
    inside = (basis * gram(basis)).sum(dim=(-2, -1))
    outside = probes - basis @ (basis.mT @ probes)
    samples = (outside * gram(outside)).sum(dim=-2)  # (…, p), each of mean ‖G - VVᵀG‖²
    total = inside + samples.mean(dim=-1)
    fraction = torch.where(total > 0, inside / total, 1.0)
    deviation = samples.std(dim=-1) / p**0.5
    return fraction, torch.where(total > 0, deviation * inside / total.square(), 0.0)


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of two orthonormal bases, (…, min(k_a, k_b)), descending, within [0, 1]."""
    return torch.linalg.svdvals(rotation(a, b)).clamp(0.0, 1.0)


def scout_alpha(dim: int, rank: int, scouts: int) -> float:
    """T3: alpha = j / (dim - rank + j) in E‖G - VVᵀG‖² <= (1 - alpha) ‖G‖² for V after a step; 1.0 when V spans the space."""
    return 1.0 if rank >= dim else scouts / (dim - rank + scouts)


class Subspace:
    """Tracks an orthonormal basis V of the dominant left subspace of a changing matrix G.

    Args:
        dim: rows of G.
        rank: columns of V. A rank above ``dim`` is the whole space, and is kept as ``dim`` columns.
        scouts: columns replaced by fresh Gaussian directions before every step; 0 to ``rank``.
        batch: leading shape, for many matrices of one shape in one call.
        seed: with the number of the step it determines the scouts and the first basis.
        device: where the basis lives.
        dtype: in which the basis is kept; arithmetic is in float32, or float64 for float64.

    Raises:
        ConfigError: for a dim, rank or number of scouts that is not legal.

    >>> space = Subspace(4, rank=1, seed=0)
    >>> g = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0], [0.0, 0.1]])
    >>> for _ in range(3):
    ...     _ = space.step(g)
    >>> round(float(space.energy(g)), 3)
    0.999
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        scouts: int = 1,
        batch: Sequence[int] = (),
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dim < 1:
            raise ConfigError.of("dim", dim, "an integer >= 1")
        if rank < 1:
            raise ConfigError.of("rank", rank, "an integer >= 1")
        if not dtype.is_floating_point:
            raise ConfigError.of("dtype", dtype, "a floating point type")
        self.dim, self.rank, self.seed, self.dtype = dim, min(rank, dim), seed, dtype
        if not 0 <= scouts <= self.rank:
            raise ConfigError.of("scouts", scouts, f"an integer from 0 to the rank, {self.rank}")
        self.scouts, self.batch, self.steps = scouts, tuple(batch), 0
        start = gaussian((*self.batch, dim, self.rank), (seed, 0), device, torch.float64 if dtype == torch.float64 else torch.float32)
        self._basis = orthonormalize(start).to(dtype)
        self._previous = self._basis

    @property
    def basis(self) -> Tensor:
        """V (…, dim, rank) with orthonormal columns, strongest first; float32 unless kept in float64."""
        return self._basis if self.dtype in (torch.float32, torch.float64) else orthonormalize(self._basis)

    @property
    def drift(self) -> Tensor:
        """Cosines of the principal angles with the basis before the last step, (…, rank): 1 where a direction did not move."""
        return principal_cosines(self.basis, orthonormalize(self._previous))

    @property
    def alpha(self) -> float:
        """The certified contraction of G -> VVᵀG in expectation over the scouts, for V after a step on G."""
        return scout_alpha(self.dim, self.rank, self.scouts)

    def step(self, g: Operator) -> Tensor:
        """One power step with fresh scouts; g is G (…, dim, n) or X (…, dim, rank) -> G Gᵀ X. Returns the new basis."""
        if isinstance(g, Tensor) and (g.ndim < 2 or g.shape[:-1] != (*self.batch, self.dim)):
            raise ConfigError.of("g.shape", tuple(g.shape), f"{(*self.batch, self.dim)} and one more dimension")
        self.steps += 1
        scouts = None
        if self.scouts and self.rank < self.dim:
            shape = (*self.batch, self.dim, self.scouts)
            scouts = gaussian(shape, (self.seed, self.steps), self._basis.device, torch.promote_types(self.dtype, torch.float32))
        self._previous = self._basis
        self._basis = power_step(self._basis, g, scouts)[0].to(self.dtype)
        return self.basis

    def energy(self, g: Tensor) -> Tensor:
        """The fraction ‖VᵀG‖² / ‖G‖² of G (…, dim, n) that the basis captures, (…)."""
        return captured_energy(self.basis, g)

    def rotate(self, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (…, rank, n) kept in the basis before the last step, carried to the present one."""
        return rotate_moments(rotation(self.basis, self._previous), m, v)

    def state_dict(self) -> dict[str, Tensor | int]:
        """Tensors and plain numbers; a restored subspace goes on exactly as this one would."""
        return {"basis": self._basis, "previous": self._previous, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        for name in ("basis", "previous"):
            value = state[name]
            if not isinstance(value, Tensor) or value.shape != self._basis.shape:
                raise ConfigError.of(f"state[{name!r}]", getattr(value, "shape", value), f"a tensor of shape {tuple(self._basis.shape)}")
        self._basis = torch.as_tensor(state["basis"]).to(self._basis).clone()
        self._previous = torch.as_tensor(state["previous"]).to(self._basis).clone()
        self.steps = int(state["steps"])

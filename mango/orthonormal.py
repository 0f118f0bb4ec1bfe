"""Orthonormal bases of tall matrices by products and small factorisations.

Sources: CholeskyQR2 (arXiv:1409.5116 and Yamamoto et al. 2015); shifted CholeskyQR (arXiv:1809.11085).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mango.draws import gaussian

# ‖R⁻¹‖² below which one round of CholeskyQR is enough: VᵀV - I then stays below 1e-5, or below the 2^-9 of bfloat16
ONE_ROUND, ONE_ROUND_ROUGH = 4.0, 1e3


def orthonormalize(x: Tensor) -> Tensor:
    """An orthonormal basis whose leading columns span those of x, by CholeskyQR2 in float32 (float64 for float64 input).

    Column norms are checked, and divided out of the Gram matrix, first. Where columns are zero, dependent, ill-conditioned, or
    so large or small that their squares leave the range of floats, that member of the batch falls back to Householder QR in float64
    (on a CPU) or to shifted CholeskyQR (elsewhere: no synchronisation with the host). Dependent columns are replaced by directions of
    the complement.

    Args:
        x: (…, n, k), any floating dtype. Columns beyond the n-th are ignored: n columns span the space already.

    Returns:
        (…, n, min(n, k)) in float32, or float64 for float64 input; the Frobenius norm of VᵀV - I is below 1e-5.
    """
    return cholesky_qr(x)[0]


def cholesky_qr(x: Tensor, size: Tensor | None = None, rough: bool = False) -> tuple[Tensor, Tensor]:
    """``orthonormalize``, and the diagonal of R in x = V R, (…, min(n, k)): how much each column adds to the span of those before it.
    With ``size`` (…, k) the columns are sorted by the square of diagonal / size, strongest first, and it takes the diagonal's place.

    Rounding the Gram matrix leaves VᵀV - I of at most ‖R⁻¹‖² times that rounding. Where ‖R⁻¹‖² is small one round is therefore as good as
    two, and a CPU, which can look, stops there. ``rough`` asks for no more than bfloat16 resolves.
    """
    n, k = x.shape[-2:]
    x = x[..., : min(n, k)].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.numel() == 0:
        return x, x.new_zeros(*x.shape[:-2], x.shape[-1])
    gram = x.mT @ x  # (…, k, k)
    norm = gram.diagonal(dim1=-2, dim2=-1).sqrt()  # (…, k)
    inverse, r1 = _cholesky_inverse(gram / (norm.unsqueeze(-1) * norm.unsqueeze(-2)))
    scaled = inverse / norm.unsqueeze(-1)
    if x.device.type == "cpu" and bool((norm.amin() > 1e-15) & (norm.amax() < 1e15)):
        most = ONE_ROUND_ROUGH if rough else ONE_ROUND
        # the squared Frobenius norm bounds it too, and costs no product
        if bool((torch.linalg.matrix_norm(inverse).square() < most).all()) or bool((_squared_norm(inverse) < most).all()):
            scaled, diagonal = _sorted(scaled, r1 * norm, size)  # a smaller matrix to sort the columns of
            return x @ scaled, diagonal
    first = x @ scaled
    gram = first.mT @ first
    inverse, r2 = _cholesky_inverse(gram)
    basis, diagonal = first @ inverse, r1 * r2 * norm
    # the second round squares what the first one left; written so that NaN counts as ill-conditioned
    left = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax(dim=(-2, -1))
    well = (left < 1e-2) & (norm.amin(dim=-1) > 1e-15) & (norm.amax(dim=-1) < 1e15)
    if x.device.type == "cpu":
        if not bool(well.all()):
            ill = ~well
            unit, norm = _unit_columns(x[ill].double())
            q, r = torch.linalg.qr(unit)
            basis[ill] = q.to(x.dtype)
            diagonal[ill] = (r.diagonal(dim1=-2, dim2=-1).abs() * norm).to(x.dtype)
    else:
        unit, norm = _unit_columns(x)
        q, r = _shifted_cholesky_qr(unit)
        basis = torch.where(well[..., None, None], basis, q)
        diagonal = torch.where(well[..., None], diagonal, r * norm)
    return _sorted(basis, diagonal, size)


def _sorted(basis: Tensor, diagonal: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    if size is None:
        return basis, diagonal
    energy, order = (diagonal / size).square().sort(dim=-1, descending=True, stable=True)
    return basis.gather(-1, order.unsqueeze(-2).expand_as(basis)), energy


def _squared_norm(x: Tensor) -> Tensor:
    """An upper bound of ‖x‖₂² for x (…, k, k), (…,): the fourth root of ‖(xᵀx)⁴‖_F, at most k^(1/8) times too large; NaN stays NaN."""
    square = x.mT @ x
    fourth = square @ square
    return torch.linalg.matrix_norm(fourth @ fourth).pow(0.25)


def _unit_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, n, k) with columns of norm 1, or 0 where they are 0, and the norms (…, k); no square under- or overflows."""
    peak = x.abs().amax(dim=-2, keepdim=True)
    unit = torch.where(peak > 0, x / peak, 0.0)
    norm = torch.linalg.vector_norm(unit, dim=-2, keepdim=True)
    return torch.where(norm > 0, unit / norm, 0.0), (norm * peak).squeeze(-2)


def _cholesky_inverse(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R⁻¹ and the diagonal of R for gram = RᵀR (…, k, k); a failed factorisation shows as NaN or as a poor next Gram matrix."""
    lower, _ = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return torch.linalg.solve_triangular(lower, eye, upper=False).mT, lower.diagonal(dim1=-2, dim2=-1)


def _shifted_cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """CholeskyQR without a branch, for unit or zero columns x (…, n, k): a shift lets every factorisation succeed.

    Each shifted round divides the condition number by about 1/√shift. Columns that two rounds leave dependent on earlier
    ones are replaced by Gaussian directions; two rounds more condition these, and two without a shift finish.
    """
    n, k = x.shape[-2:]
    shift = 4 * k * torch.finfo(x.dtype).eps
    eye = torch.eye(k, dtype=x.dtype, device=x.device)
    fresh = gaussian((n, k), (k,), x.device, x.dtype) / n**0.5
    diagonal, dependent = torch.ones_like(x[..., 0, :]), torch.zeros_like(x[..., 0, :], dtype=torch.bool)
    for number, added in enumerate((shift, shift, shift, shift, 0.0, 0.0)):
        inverse, r = _cholesky_inverse(x.mT @ x + added * eye)
        x, diagonal = x @ inverse, diagonal * r
        if number == 1:
            dependent = ~(torch.linalg.vector_norm(x, dim=-2) > 0.1)  # (…, k)
            x = torch.where(dependent.unsqueeze(-2), fresh, x)
    return x, torch.where(dependent, 0.0, diagonal)

"""A gradient as factors: G ≈ P U, with P orthonormal on one side of the matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mango.orthonormal import orthonormalize
from mango.subspace import rotation


@dataclass(frozen=True)
class Factors:
    """What takes the place of a gradient until an optimizer consumes it (``parameter.factors``, as ``parameter.grad``).

    Attributes:
        basis: P, orthonormal columns, strongest first: (outputs, k), or (inputs, k) where ``columns``.
        coefficients: U = Pᵀ G, (k, inputs); or Pᵀ Gᵀ, (k, outputs) where ``columns``.
        columns: whether P spans columns: G ≈ (P U)ᵀ.
        extra: None, or two more factors (left, right) of G, (outputs, s) and (s, inputs), without orthonormality; (inputs, s) and
            (s, outputs) of Gᵀ where ``columns``.
    """

    basis: Tensor
    coefficients: Tensor
    columns: bool
    extra: tuple[Tensor, Tensor] | None = None

    def product(self) -> Tensor:
        """The gradient that the factors stand for, (outputs, inputs)."""
        total = self.basis @ self.coefficients
        if self.extra is not None:
            total = total.addmm_(*self.extra)
        return total.mT if self.columns else total

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.basis, self.coefficients, *(self.extra or ())))

    def add(self, other: Factors) -> Factors:
        """The sum with the factors of another micro-batch, cut to the larger rank again: its leading singular directions."""
        span = orthonormalize(torch.cat([self.basis, other.basis], dim=1))
        coefficients = sum((rotation(span, one.basis) @ one.coefficients for one in (self, other)), span.new_zeros(()))
        keep = max(self.basis.shape[1], other.basis.shape[1])
        turn = torch.linalg.eigh(coefficients @ coefficients.mT)[1].flip(1)[:, :keep]  # (≤ 2k, k) strongest first
        extras = [one.extra for one in (self, other) if one.extra is not None]
        extra = (torch.cat([left for left, _ in extras], 1), torch.cat([right for _, right in extras], 0)) if extras else None
        return replace(self, basis=span @ turn, coefficients=turn.mT @ coefficients, extra=extra)


def leave(parameter: Tensor, factors: Factors) -> None:
    """Put factors where an optimizer finds them; those of an earlier micro-batch are added to."""
    held = getattr(parameter, "factors", None)
    parameter.factors = factors if held is None else held.add(factors)  # type: ignore[attr-defined]


def take(parameter: Tensor) -> Factors | None:
    """The factors of a parameter, which are then gone."""
    held: Factors | None = getattr(parameter, "factors", None)
    parameter.factors = None  # type: ignore[attr-defined]
    return held

"""How far Mango steps along what its basis missed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango.products import square_sums
from mango.stacked import Stacked

if TYPE_CHECKING:
    from mango.optim.layers import Hyper


class Residual:
    """Scales of the residual F = H - PU of a stack of layers, for its rows and for its columns.

    Args:
        scaling: "factored" or "column", as of the plan.
        layers: how many.
        shape: of one matrix, (rows, cols).
        rank: of the basis, below the smaller side.
        device: of the parameters.

    Attributes:
        means: running mean squares along rows ("rows_sq") and down columns ("cols_sq") of F, with "factored" scaling.
    """

    def __init__(self, scaling: str, layers: int, shape: tuple[int, int], rank: int, device: torch.device) -> None:
        self.layers, self.rank, self.device = layers, rank, device
        self.rows, self.cols = shape
        self.small, self.large = min(shape), max(shape)
        sides = {"rows_sq": self.rows, "cols_sq": self.cols} if scaling == "factored" else {}
        self.means = {name: Stacked("fp32", layers, (side,), device) for name, side in sides.items()}

    def across(self, sums: tuple[Tensor, Tensor]) -> Tensor:
        """Of something along rows and down columns: that over the smaller dimension, (layers, n)."""
        return sums[1] if self.rows <= self.cols else sums[0]

    def factored_scale(self, sums: tuple[Tensor, Tensor], adam: Tensor, hyper: Hyper, part: slice) -> tuple[Tensor, Tensor]:
        """Scales along rows (layers, rows) and down columns (layers, cols) of the residual: Adafactor's (arXiv:1804.04235), bounded.
        For the layers of ``part``, of which sums and adam are.

        Adafactor divides by the roots of running means of squares, rows times columns over their mean, so that every row and column of
        what the basis missed is stepped alike, however its strength is spread; Fira's one scale for each column leaves the rows as
        uneven as they are. Two bounds, where Adafactor clips the whole update: a row or column that has become stronger than its mean
        counts with its strength now; and per dimension the residual is stepped no further than the captured part, the sum of its
        squares over (m - r) n at most that of A over r n.
        """
        beta2 = hyper.betas[1]
        along, down = sums
        # (layers, rows), (layers, cols); sums that overflow must not stay infinite in the means
        now = (along / self.cols).clamp_max_(1e37), (down / self.rows).clamp_max_(1e37)
        means = []
        for store, seen in zip(self.means.values(), now, strict=True):
            mean = store.parts()["values"][part].lerp_(seen, 1.0 - beta2)  # kept in float32: changed in place
            means.append(torch.maximum(mean / (1.0 - beta2**hyper.step), seen).clamp_min_(1e-30))
        rows, cols = means
        # (layers, 1); the two means are one number until the stronger is taken, and either alone would depend on the orientation
        middle = rows.mean(dim=-1, keepdim=True).sqrt() * cols.mean(dim=-1, keepdim=True).sqrt()
        # mean square of what is stepped, as if squares of the residual were products of row and column
        strength = middle / now[0].mean(dim=-1, keepdim=True).clamp_min(1e-30)
        strength = strength * (now[0] / rows).mean(dim=-1, keepdim=True) * (now[1] / cols).mean(dim=-1, keepdim=True)
        captured = torch.linalg.vector_norm(adam, dim=(-2, -1)).square_().unsqueeze(-1) / (self.rank * self.large)
        most = captured * ((self.small - self.rank) / self.small)
        bound = (most / strength.clamp_min(1e-30)).sqrt_().clamp_max_(1.0)
        return (middle / rows).sqrt_() * bound, cols.rsqrt()

    def column_scale(self, missed: Tensor, captured: Tensor, adam: Tensor) -> tuple[Tensor, Tensor]:
        """The same, from squared column norms of the residual and of U, (layers, n) each: Fira's ‖A_j‖ / ‖U_j‖ (arXiv:2410.01623), bounded.

        Fira's ratio has no bound where a column of U happens to be small, and Fira then limits the growth of the whole
        residual from step to step. We bound each column instead: per dimension the residual is never stepped further than the captured
        part, ‖s_j (H - PU)_j‖ / sqrt(m - r) <= ‖A_j‖ / sqrt(r). That needs no state and does not depend on the scale of a column.
        """
        bound = torch.maximum(captured, self.rank / (self.small - self.rank) * missed).sqrt_()
        # a dead column (zero gradient, momentum left) must give a finite scale: infinity times its zero residual is not a number
        scale = square_sums(adam)[1].sqrt_() / bound.clamp_min_(1e-30)
        ones = torch.ones(self.layers, self.small, device=self.device)
        return (ones, scale) if self.rows <= self.cols else (scale, ones)

"""How far Mango steps along what its basis missed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango.products import square_sums
from mango.stacked import Stacked

if TYPE_CHECKING:
    from mango.optim.layers import Hyper

HUGE = 1e30  # a sum of squares beyond this counts as this, so that sums of them do not overflow
FAINT = 1 / 256  # of the squares of H: what is weaker counts as this, for it may be the rounding of bfloat16


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

    def formed(self, sums: tuple[Tensor, Tensor], u: Tensor, adam: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
        """Scales s, t of D = P A + diag(s) F diag(t), (layers, rows) and (layers, cols).

        sums: of squares of F, along its rows and down its columns; u, adam: U and A (layers, r, n).
        """
        if self.means:
            along, down, bound = self._factored(sums, adam, hyper)
            return along * bound, down
        scale = self._column(self.sides(sums)[1], square_sums(u)[1], adam)
        return self.sides((torch.ones(self.layers, self.small, device=self.device, dtype=torch.float32), scale))

    def unformed(self, sums: tuple[Tensor, Tensor], exact: Tensor, u: Tensor, adam: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
        """Scales a, s of D = diag(a) (P A + F diag(s)), (layers, m) and (layers, n), for an F that is not at hand.

        F diag(s) + P A is H diag(s) + P (A - U diag(s)): one product with P where two are needed if a scales F alone. What is captured
        does as well or better with a, which has mean square 1, on photographs and on text; not so where error is kept, and residual
        networks then lose. How F is spread over n follows by Pythagoras; over m it is taken to be as H is.

        sums: of squares of H, along its rows and down its columns; exact: PᵀH, and u: it as it is used, (layers, r, n).
        """
        captured = exact.square().sum(dim=-2).clamp_max_(HUGE)  # (layers, n)
        along, across = (side.clamp_max(HUGE) for side in self.sides(sums))
        if not self.means:
            scale = self._column((across - captured).clamp_min_(0.0), captured if u is exact else square_sums(u)[1], adam)
            return torch.ones(self.layers, self.small, device=self.device, dtype=torch.float32), scale
        along = torch.maximum(along, FAINT * along.mean(dim=-1, keepdim=True))
        missed = torch.maximum(across - captured, FAINT * across)  # (layers, n)
        share = missed.sum(dim=-1, keepdim=True) / across.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        by_row, by_column, bound = self._factored(self.sides((along * share, missed)), adam, hyper)
        a, s = self.sides((by_row, by_column))
        size = torch.linalg.vector_norm(a, dim=-1, keepdim=True) / self.small**0.5  # (layers, 1)
        return a / size, s * (size * bound)

    def sides(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Something for rows and columns as that for the smaller and the larger dimension; and the other way round."""
        return pair if self.rows <= self.cols else pair[::-1]

    def _factored(self, sums: tuple[Tensor, Tensor], adam: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor, Tensor]:
        """Adafactor's scales (arXiv:1804.04235), (layers, rows) and (layers, cols), and what bounds their product, (layers, 1).

        Adafactor divides by the roots of running means of squares, rows times columns over their mean, so that every row and column of
        what the basis missed is stepped alike, however its strength is spread; Fira's one scale for each column leaves the rows as
        uneven as they are. Two bounds, where Adafactor clips the whole update: a row or column that has become stronger than its mean
        counts with its strength now; and per dimension the residual is stepped no further than the captured part, the sum of its
        squares over (m - r) n at most that of A over r n.
        """
        beta2 = hyper.betas[1]
        along, down = sums
        # (layers, rows), (layers, cols); sums that overflow must not stay infinite in the means
        now = (along / self.cols).clamp_max_(HUGE), (down / self.rows).clamp_max_(HUGE)
        means = []
        for store, seen in zip(self.means.values(), now, strict=True):
            mean = store.parts()["values"].lerp_(seen, 1.0 - beta2)  # kept in float32: changed in place
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
        return (middle / rows).sqrt_(), cols.rsqrt(), bound

    def _column(self, missed: Tensor, captured: Tensor, adam: Tensor) -> Tensor:
        """The same, (layers, n), from squared column norms of the residual and of U: Fira's ‖A_j‖ / ‖U_j‖ (arXiv:2410.01623), bounded.

        Fira's ratio has no bound where a column of U happens to be small, and Fira then limits the growth of the whole
        residual from step to step. We bound each column instead: per dimension the residual is never stepped further than the captured
        part, ‖s_j (H - PU)_j‖ / sqrt(m - r) <= ‖A_j‖ / sqrt(r). That needs no state and does not depend on the scale of a column.
        """
        bound = torch.maximum(captured, self.rank / (self.small - self.rank) * missed).sqrt_()
        # a dead column (zero gradient, momentum left) must give a finite scale: infinity times its zero residual is not a number
        return square_sums(adam)[1].sqrt_() / bound.clamp_min_(1e-30)

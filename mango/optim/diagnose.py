"""What one step's compression did to the gradients of a stack of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango.orthonormal import orthonormalize
from mango.subspace import captured_energy, principal_cosines

if TYPE_CHECKING:
    from mango.optim.layers import Hyper, LayerStack


def diagnose(
    stack: LayerStack,
    h: Tensor,  # (layers, rows, cols), before it is overwritten
    basis: Tensor,  # (layers, m, r), the new one
    exact: Tensor,  # (layers, r, n): PᵀH
    u: Tensor,  # (layers, r, n): the same through the factor codec
    old: Tensor,  # (layers, m, r), the basis before
    grads: Sequence[Tensor],
    hyper: Hyper,
    names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """The values of ``Mango.diagnostics`` by name; the moments of the stack are already those of this step."""
    a = h if stack.rows <= stack.cols else h.mT  # (layers, m, n)
    total = torch.linalg.matrix_norm(a).square()  # (layers,)
    left = torch.linalg.matrix_norm(a - basis @ u).square()
    gradient = torch.stack([torch.linalg.vector_norm(grad.float()) for grad in grads])
    first, second = stack.moments.first.read(), stack.moments.root.read()  # (layers, r, n)
    momentum, spread = torch.linalg.matrix_norm(first), torch.linalg.matrix_norm(second)
    unbiased = (1.0 - hyper.betas[1] ** hyper.step) / (1.0 - hyper.betas[0] ** hyper.step) ** 2
    columns = {
        "measured": torch.where(total > 0, 1.0 - left / total, 1.0),
        "energy": captured_energy(basis, a),
        "drift": principal_cosines(basis, orthonormalize(old)).mean(dim=-1),
        "error_ratio": torch.where(gradient > 0, left.sqrt() / gradient, 0.0),
        "norm": gradient,
        "cosine": (first * exact).sum((-2, -1)) / (momentum * torch.linalg.matrix_norm(exact)).clamp_min(1e-30),
        "variance": (1.0 - unbiased * momentum.square() / spread.square().clamp_min(1e-30)).clamp(0.0, 1.0),
    }
    rows = torch.stack(list(columns.values()), dim=-1).tolist()
    fixed = {"certified": stack.certified(hyper)}
    return {name: fixed | dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=True)}

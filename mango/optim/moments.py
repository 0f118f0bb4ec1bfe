"""Adam's moments of the factors of a stack of layers: stored by a codec, and carried along as the bases move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango import native
from mango.native.threads import run
from mango.stacked import Stacked
from mango.subspace import rotate_moments
from mango.workspace import Workspace

if TYPE_CHECKING:
    from mango.optim.layers import Hyper


class Moments:
    """The first moment of U (layers, rank, large) and the root of the second.

    The root halves the decades that the codec must span, and its error is relative in the update's denominator.
    """

    def __init__(self, codec: str, layers: int, rank: int, large: int, device: torch.device) -> None:
        self.shape, self.device = (layers, rank, large), device
        self.first = Stacked(codec, layers, (rank, large), device)
        self.root = Stacked(codec, layers, (rank, large), device)

    def read_first(self, workspace: Workspace) -> Tensor:
        """The first moment (layers, rank, large) float32; ``step`` overwrites it."""
        return self.first.read(workspace.take("first", self.shape))

    def step(self, u: Tensor, r: Tensor, first: Tensor, hyper: Hyper, dtype: torch.dtype, workspace: Workspace) -> Tensor:
        """Adam's direction for the factor U (layers, rank, large), with the moments carried to the new basis by r (layers, rank, rank).

        Row i of r has squared norm c <= 1: that much of the new direction lay in the old span, and the rest has no history. Left at zero,
        the missing second moment would blow the step up to (1 - beta1) / sqrt(1 - beta2) times its size, as bias correction knows only
        the age of the state. The rest is taken to have had the present factor all along, so that a wholly new direction (c = 0)
        steps as Adam's own first step does: its corrected moments are U and U².

        Args:
            first: as ``read_first`` gave it.
            dtype: of the operands that are rotated.
        """
        beta1, beta2 = hyper.betas
        second = self.root.read(workspace.take("second", self.shape)).square_()
        both = (2, *self.shape)
        m, v = first, second
        if dtype != torch.float32:
            m, v = (low.copy_(high) for low, high in zip(workspace.take("moments", both, dtype), (first, second), strict=True))
        turned = rotate_moments(r.to(dtype), m, v, out=workspace.take("turned", both, dtype).unbind(0))
        new = (1.0 - r.square().sum(dim=-1)).clamp_(0.0, 1.0)  # (layers, rank)
        old = beta1 * (1.0 - beta1 ** (hyper.step - 1)), beta2 * (1.0 - beta2 ** (hyper.step - 1))
        unbias = 1.0 - beta1**hyper.step, (1.0 - beta2**hyper.step) ** 0.5
        adam = workspace.take("adam", self.shape)
        if native.ready(self.device):
            self._compiled(turned, first, second, u, new, hyper, old, unbias, adam)
        else:
            new = new.unsqueeze(-1)
            first.copy_(turned[0]).mul_(beta1).addcmul_(new * old[0] + (1.0 - beta1), u)
            second.copy_(turned[1]).mul_(beta2).addcmul_(new * old[1] + (1.0 - beta2), u.square()).sqrt_()
            torch.div(first, unbias[0], out=adam).div_((second / unbias[1]).add_(hyper.eps))
        self.first.write(first)
        self.root.write(second)
        return adam

    def _compiled(
        self,
        turned: tuple[Tensor, ...],
        first: Tensor,
        second: Tensor,
        u: Tensor,
        new: Tensor,
        hyper: Hyper,
        old: tuple[float, float],
        unbias: tuple[float, float],
        adam: Tensor,
    ) -> None:
        from mango.native import optim

        layers, rank, large = self.shape
        m, v = (native.float_bits(moment.view(-1, large)) for moment in turned)
        factors = (u.contiguous().view(-1, large), new.reshape(-1))
        numbers = map(float, (*hyper.betas, *old, *unbias, hyper.eps))
        written = (part.view(-1, large) for part in (first, second, adam))
        run(optim.moments, layers * rank, large, m, v, *factors, *numbers, *written)

"""Adam's moments of the factors of a stack of layers: stored by a codec, and carried along as the bases move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mango import native
from mango.codecs.base import all_finite
from mango.codecs.int8 import Int8, code_table
from mango.errors import NonFinite
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

    def read_first(self, dtype: torch.dtype, workspace: Workspace) -> Tensor:
        """The first moment (layers, rank, large) in this type, that of the operands of the rotation; valid until the next ``step``."""
        return self.first.read(workspace.take("first", self.shape, dtype))

    def step(self, u: Tensor, r: Tensor, first: Tensor, hyper: Hyper, workspace: Workspace) -> Tensor:
        """Adam's direction for the factor U (layers, rank, large), with the moments carried to the new basis by r (layers, rank, rank).

        Row i of r has squared norm c <= 1: that much of the new direction lay in the old span, and the rest has no history. Left at zero,
        the missing second moment would blow the step up to (1 - beta1) / sqrt(1 - beta2) times its size, as bias correction knows only
        the age of the state. The rest is taken to have had the present factor all along, so that a wholly new direction (c = 0)
        steps as Adam's own first step does: its corrected moments are U and U².

        Args:
            first: as ``read_first`` gave it.
        """
        beta1, beta2 = hyper.betas
        second = self.root.read(workspace.take("second", self.shape, first.dtype)).square_()
        turned = rotate_moments(r.to(first.dtype), first, second, out=workspace.take("turned", (2, *self.shape), first.dtype).unbind(0))
        new = (1.0 - r.square().sum(dim=-1)).clamp_(0.0, 1.0)  # (layers, rank)
        old = beta1 * (1.0 - beta1 ** (hyper.step - 1)), beta2 * (1.0 - beta2 ** (hyper.step - 1))
        unbias = 1.0 - beta1**hyper.step, (1.0 - beta2**hyper.step) ** 0.5
        adam = workspace.take("adam", self.shape)
        if native.ready(self.device):
            self._compiled(turned, u, new, (*hyper.betas, *old, *unbias, hyper.eps), adam, workspace)
            return adam
        new = new.unsqueeze(-1)
        mean = turned[0].float().mul_(beta1).addcmul_(new * old[0] + (1.0 - beta1), u)
        root = turned[1].float().mul_(beta2).addcmul_(new * old[1] + (1.0 - beta2), u.square()).sqrt_()
        torch.div(mean, unbias[0], out=adam).div_((root / unbias[1]).add_(hyper.eps))
        self.first.write(mean)
        self.root.write(root)
        return adam

    def _compiled(
        self, turned: tuple[Tensor, ...], u: Tensor, new: Tensor, numbers: tuple[float, ...], adam: Tensor, workspace: Workspace
    ) -> None:
        """The same in one pass, which also stores the moments where they are bytes in whole blocks along the rows."""
        from mango.native import optim

        layers, rank, large = self.shape
        rows = layers * rank
        m, v = (native.float_bits(moment.view(rows, large)) for moment in turned)
        codec = self.first.codec
        coded = isinstance(codec, Int8) and not (codec.double_quant or large % codec.block or optim.TILE % codec.block)
        nothing, stores = torch.empty(0, large, device=self.device, dtype=torch.float32), (self.first, self.root)
        if coded:
            mean = root = nothing
            codes = [store.parts()[name].view(rows, -1) for store in stores for name in ("codes", "scales")]
        else:
            mean, root = (workspace.take(name, (rows, large)) for name in ("mean", "root"))
            codes = [nothing.byte(), nothing] * 2
        written = (adam.view(rows, large), mean, root, codec.block, code_table() if coded else nothing.byte().view(-1), *codes)
        run(optim.moments, rows, large, m, v, u.contiguous().view(rows, large), new.reshape(-1), *map(float, numbers), *written)
        if not coded:
            for store, moment in zip(stores, (mean, root), strict=True):
                store.write(moment.view(self.shape))
        elif not all(all_finite(scales.view(-1)) for scales in codes[1::2]):
            raise NonFinite("a moment holds NaN, infinity or a value beyond float32")

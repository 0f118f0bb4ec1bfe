"""Error feedback's memory: what compression left out of a gradient, kept for the next step.

H_t = G_t + b E_{t-1},  the step uses C(H_t),  E_t = H_t - C(H_t)   (b = 1: Seide et al. 2014; Karimireddy et al., arXiv:1901.09847).

With b < 1 an error fades by that factor a step: E is then a running sum over about 1 / (1 - b) gradients of what C missed, as momentum is
of gradients, and no longer everything that was never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mango import native
from mango.codecs.fourbit import FourBit
from mango.errors import ConfigError
from mango.native.threads import run
from mango.stacked import Stacked

KINDS = ("none", "gradient", "codec")


class ErrorBuffer:
    """The error E of same-shaped layers, in one of three forms.

    ``gradient``: a float32 buffer as large as the gradient. It belongs to the optimizer's state and not to ``parameter.grad``, so
    clearing gradients in any way (``model.zero_grad()``, ``grad = None``) does not lose it, saving keeps it, and byte counts show it.
    ``codec``: the same through a codec (nf4: 0.5625 bytes per value); what the codec rounds away is lost.
    ``none``: nothing is kept and E = 0.

    Args:
        kind: one of the three.
        codec: registry name of the codec for ``codec``.
        layers, shape, device: as of the gradients, (layers, *shape).
    """

    def __init__(self, kind: str, codec: str, layers: int, shape: Sequence[int], device: torch.device) -> None:
        if kind not in KINDS:
            raise ConfigError.of("error", kind, "one of " + ", ".join(KINDS))
        self.store = None if kind == "none" else Stacked("fp32" if kind == "gradient" else codec, layers, shape, device)

    def compensate(self, gradients: Sequence[Tensor], out: Tensor, sign: float = 1.0, decay: float = 1.0) -> Tensor:
        """H = sign * G + decay * E, written into ``out``: (layers, *shape) float32, contiguous.

        A gradient may have any shape of the same size.
        """
        rows = [row.view(gradient.shape) for row, gradient in zip(out.unbind(0), gradients, strict=True)]
        if self.store is None:
            torch._foreach_copy_(rows, list(gradients))
            return out if sign == 1.0 else out.mul_(sign)
        loop = self._loop()
        if loop is not None and all(gradient.dtype == torch.float32 and gradient.is_contiguous() for gradient in gradients):
            codec, stored = self.store.codec, self.store.parts()
            for row, gradient, codes, scales in zip(rows, gradients, stored["codes"], stored["scales"], strict=True):
                into = (gradient.detach().view(-1), sign, row.view(-1), decay)
                run(loop, self.store.numel // codec.block, codec.block, codes, scales, codec.block, codec.table(), *into)
            return out
        self.store.read(out)
        if decay != 1.0:
            out.mul_(decay)
        torch._foreach_add_(rows, list(gradients), alpha=sign)
        return out

    def keep(self, error: Tensor, *, generator: torch.Generator | None = None, name: str = "error") -> None:
        """Store E = H - C(H), (layers, *shape)."""
        if self.store is not None:
            self.store.write(error, generator=generator, name=name)

    def _loop(self) -> Callable[..., None] | None:
        """The compiled loop that decodes and adds in one pass, for four-bit codes in whole blocks on the CPU."""
        if self.store is None or self.store.padding or not isinstance(self.store.codec, FourBit) or self.store.codec.double_quant:
            return None
        if not native.ready(self.store.packed.device):
            return None
        from mango.native import optim

        return optim.compensate

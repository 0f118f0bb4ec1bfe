"""Error feedback's memory: what compression left out of a gradient, kept for the next step.

H_t = G_t + b E_{t-1},  the step uses C(H_t),  E_t = H_t - C(H_t)   (b = 1: Seide et al. 2014; Karimireddy et al., arXiv:1901.09847).

With b < 1 an error fades by that factor a step: E is then a running sum over about 1 / (1 - b) gradients of what C missed, as momentum is
of gradients, and no longer everything that was never sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mango import native
from mango.codecs.fourbit import FourBit
from mango.errors import ConfigError
from mango.native.threads import run
from mango.products import FourBits
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

    def compensate(
        self, gradients: Sequence[Tensor], out: Tensor, sign: float = 1.0, decay: float = 1.0, signs: Tensor | None = None
    ) -> Tensor:
        """H = sign * G + decay * E, written into ``out``: (layers, *shape) contiguous, float32, or bfloat16 where there is ``coded``.

        A gradient may have any shape of the same size. signs: where those of the gradients are noted besides, (layers, rows, cols / 8)
        int16, see ``notes_signs``.
        """
        if self.store is None:
            torch._foreach_copy_(_shaped(out, gradients), list(gradients))
            return out if sign == 1.0 else out.mul_(sign)
        codec = self._compiled()
        if codec is not None and all(gradient.dtype == torch.float32 and gradient.is_contiguous() for gradient in gradients):
            from mango.native import optim

            stored, bits = self.store.parts(), native.float_bits(out)
            noted = torch.empty(len(out), 0, dtype=torch.int16, device=out.device) if signs is None else signs
            for row, gradient, codes, scales, note in zip(bits, gradients, stored["codes"], stored["scales"], noted, strict=True):
                into = (gradient.detach().view(-1), sign, row.view(-1), decay, note.view(-1))
                run(optim.compensate, self.store.numel // codec.block, codec.block, codes, scales, codec.block, codec.table(), *into)
            return out
        high = out if out.dtype == torch.float32 else torch.empty(out.shape, device=out.device, dtype=torch.float32)
        self.store.read(high)
        if decay != 1.0:
            high.mul_(decay)
        torch._foreach_add_(_shaped(high, gradients), list(gradients), alpha=sign)
        return out if high is out else out.copy_(high)

    def coded(self) -> FourBits | None:
        """The stored error (layers, rows, cols), if the loop that finds an error can store it as well: four-bit codes in whole blocks along
        the rows, on the CPU."""
        codec = self._compiled()
        if self.store is None or codec is None or codec.stochastic:
            return None
        from mango.native.jit import TILE

        if self.store.shape[-1] % codec.block or TILE % codec.block:
            return None
        parts, shape = self.store.parts(), (self.store.layers, *self.store.shape[:-1], -1)
        return FourBits(parts["codes"].view(shape), parts["scales"].view(shape), codec.block, *codec.thresholds())

    def notes_signs(self) -> bool:
        """Whether ``compensate`` can note signs of float32 gradients as they lie: where there is ``coded`` and the processor packs them."""
        coded = self.coded()
        if coded is None or coded.block % 16:
            return False
        from mango.native.registers import PERMUTES

        return PERMUTES

    def keep(self, error: Tensor, *, generator: torch.Generator | None = None, name: str = "error") -> None:
        """Store E = H - C(H), (layers, *shape)."""
        if self.store is not None:
            self.store.write(error, generator=generator, name=name)

    def _compiled(self) -> FourBit | None:
        """The codec whose codes compiled loops read: of four bits, in whole blocks on the CPU."""
        if self.store is None or self.store.padding or not isinstance(self.store.codec, FourBit) or self.store.codec.double_quant:
            return None
        return self.store.codec if native.ready(self.store.packed.device) else None


def _shaped(x: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The layers of x (layers, …), each seen in the shape of the tensor that it belongs to."""
    return [layer.view(tensor.shape) for layer, tensor in zip(x.unbind(0), like, strict=True)]

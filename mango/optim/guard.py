"""Gradients that are not finite are refused without making an accelerator wait for the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mango.errors import NonFinite


class Guard:
    """Checks the gradients of a step.

    On a CPU the check is immediate, and nothing has been changed when it raises. On an accelerator reading the result would stop
    the queue of kernels: gradients that are not finite are taken as zero instead, and the verdict, copied meanwhile, is raised by
    the next call.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event, list[str]] | None = None

    def admit(self, grads: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """The gradients to use. Raises: NonFinite, naming the parameters of this call or of the one before."""
        self.settle()
        if not grads:
            return []
        # the norm of a tensor is not finite when one value is not; values above 1e19 can overflow it too, hence the second look
        norms = torch._foreach_norm(list(grads))
        if grads[0].device.type == "cpu":
            if not bool(torch.stack(norms).isfinite().all()):
                self._refuse([name for name, grad in zip(names, grads, strict=True) if not bool(grad.isfinite().all())])
            return list(grads)
        finite = torch.stack([norm.float() for norm in norms]).isfinite()  # (len(grads),)
        event = torch.cuda.Event()
        verdict = torch.empty(len(grads), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        event.record()
        self._pending = (verdict, event, list(names))
        return [torch.where(ok, grad, 0.0) for ok, grad in zip(finite.unbind(), grads, strict=True)]

    def settle(self) -> None:
        """Raise what the last call on an accelerator found."""
        if self._pending is None:
            return
        verdict, event, names = self._pending
        self._pending = None
        event.synchronize()
        self._refuse([name for name, ok in zip(names, verdict.tolist(), strict=True) if not ok])

    @staticmethod
    def _refuse(names: Sequence[str]) -> None:
        if names:
            more = f" and {len(names) - 5} others" if len(names) > 5 else ""
            raise NonFinite(f"the gradient of {', '.join(names[:5])}{more} holds NaN or infinity")

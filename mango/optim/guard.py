"""Gradients that are not finite are refused without making an accelerator wait for the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mango.codecs.base import all_finite
from mango.errors import NonFinite


class Guard:
    """Checks the gradients of a step.

    Where reading a result is free (anything but CUDA) the check is immediate, and nothing has been changed when it raises. On CUDA reading
    would stop the queue of kernels: gradients that are not finite are set to zero instead, in place, since a second copy of all gradients
    would not fit, and the verdict, copied meanwhile, is raised by the next call.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, torch.cuda.Event, list[str]]] = []

    def admit(self, grads: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """The gradients to use. Raises: NonFinite, naming the parameters of this call or of the one before."""
        self.settle()
        admitted = list(grads)
        for device in dict.fromkeys(grad.device for grad in grads):
            places = [place for place, grad in enumerate(grads) if grad.device == device]
            if device.type != "cuda":
                # from the last on: a step begins with the first, which are still in a cache then
                self._refuse([names[place] for place in reversed(places) if not all_finite(grads[place])][::-1])
                continue
            # norms, for which a card has one kernel; in float32 those of large values overflow, and count as not finite
            norms = torch._foreach_norm([grads[place] for place in places], dtype=torch.float32)
            finite = torch.stack(norms).isfinite()  # (len(places),)
            verdict = torch.empty(len(places), dtype=torch.bool, device="cpu", pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._pending.append((verdict, event, [names[place] for place in places]))
            for place, ok in zip(places, finite.unbind(), strict=True):
                admitted[place] = grads[place].masked_fill_(~ok, 0.0)
        return admitted

    def settle(self) -> None:
        """Raise what the last call found on CUDA."""
        pending, self._pending = self._pending, []
        refused = []
        for verdict, event, names in pending:
            event.synchronize()
            refused += [name for name, ok in zip(names, verdict.tolist(), strict=True) if not ok]
        self._refuse(refused)

    @staticmethod
    def _refuse(names: Sequence[str]) -> None:
        if names:
            more = f" and {len(names) - 5} others" if len(names) > 5 else ""
            raise NonFinite(f"the gradient of {', '.join(names[:5])}{more} holds NaN or infinity")

"""Where the bytes are: parameters, gradients, activations saved for the backward pass, and what the process and the device hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from resource import RUSAGE_SELF, getrusage

import torch
from torch import Tensor, nn


class MemoryLedger:
    """Counts bytes by category, each storage once, however many tensors view it.

    ``with ledger.activations(): loss = model(x)`` counts what autograd keeps for the backward pass by saved-tensor hooks: the peak of what
    is alive at one time, without parameters and buffers, which are kept anyway. A custom autograd function is counted for what it gives to
    ``save_for_backward``; tensors that it hides on its context are not seen. The hooks run for every saved tensor, so the loop uses them on
    one step only. The optimizer's state is counted by ``mango.optim.state_nbytes``.

    Args:
        model: the module whose parameters, buffers and gradients are counted.

    Attributes:
        saved_activations: bytes, the peak over all ``activations()`` blocks so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.saved_activations = 0
        self._alive: dict[int, int] = {}  # storage address -> how many saved tensors view it
        self._bytes = 0

    def parameters(self) -> int:
        """Bytes of parameters and buffers; tied ones count once."""
        return _storage_bytes([*self.model.parameters(), *self.model.buffers()])

    def gradients(self) -> int:
        """Bytes of the gradients that exist now."""
        return _storage_bytes(p.grad for p in self.model.parameters() if p.grad is not None)

    @contextmanager
    def activations(self) -> Iterator[None]:
        """Count the tensors that autograd saves inside this block, until the backward pass frees them."""
        kept = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}

        def pack(tensor: Tensor) -> Tensor | _Saved:
            if tensor.untyped_storage().data_ptr() in kept or tensor.untyped_storage().nbytes() == 0:
                return tensor
            return _Saved(tensor, self)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor if isinstance(saved, _Saved) else saved):
            yield

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        views = self._alive.get(storage.data_ptr(), 0)
        self._alive[storage.data_ptr()] = views + 1
        if views == 0:
            self._bytes += storage.nbytes()
            self.saved_activations = max(self.saved_activations, self._bytes)

    def _remove(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        views = self._alive[storage.data_ptr()] - 1
        if views:
            self._alive[storage.data_ptr()] = views
        else:
            del self._alive[storage.data_ptr()]
            self._bytes -= storage.nbytes()


class _Saved:
    """A saved tensor that tells the ledger when autograd lets go of it."""

    __slots__ = ("ledger", "tensor")

    def __init__(self, tensor: Tensor, ledger: MemoryLedger) -> None:
        self.tensor = tensor
        self.ledger = ledger
        ledger._add(tensor)

    def __del__(self) -> None:
        self.ledger._remove(self.tensor)


def rss_peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_peaks(device: torch.device) -> tuple[int, int] | tuple[None, None]:
    """Largest bytes allocated and reserved on a CUDA device so far; (None, None) elsewhere."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

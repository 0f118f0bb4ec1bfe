"""Where the bytes are: parameters, gradients, optimizer state, activations saved for backward, what process and device hold."""

from __future__ import annotations

import csv
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median

import torch
from torch import Tensor, nn

Row = dict[str, int]  # category -> bytes


class MemoryLedger:
    """Counts bytes by category, each storage once, however many tensors view it.

    ``with ledger.activations(): loss = model(x)`` counts what autograd keeps for the backward pass by saved-tensor hooks: the peak of what
    is alive at one time, without parameters and buffers, which are kept anyway. A custom autograd function is counted for what it gives to
    ``save_for_backward``; tensors that it hides on its context are not seen. ``with ledger.step():`` around a whole training step, its
    forward pass included, does the same and adds a line to ``rows``. The hooks run for every saved tensor and every module: a few
    microseconds each, summed in ``seconds``, so the loop uses them on one step only.

    Args:
        model: the module whose parameters, buffers and gradients are counted.
        optimizer: whose state is counted; None counts none.

    Attributes:
        saved_activations: bytes, the peak over all ``activations()`` blocks so far.
        peak_gradients: bytes, the most gradients that were alive at one time in those blocks: where each is freed once it is used
            (``fuse_backward``), that of one parameter.
        saved_by_layer: module -> bytes, the peak of what was first saved in its own forward pass, not that of a module inside it.
        rows: one for each ``step()``, see ``categories``.
        seconds: that the ledger itself has taken.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.saved_activations = self.peak_gradients = 0
        self.saved_by_layer: dict[str, int] = {}
        self.rows: list[Row] = []
        self.seconds = 0.0
        self._alive: dict[int, tuple[int, str]] = {}  # storage address -> how many saved tensors view it, the module that saved it first
        self._bytes = 0
        self._step_peak = 0
        self._layer_bytes: dict[str, int] = defaultdict(int)
        self._inside = [""]  # names of the modules whose forward pass is running

    def parameters(self) -> int:
        """Bytes of parameters and buffers; tied ones count once. Scales that bitsandbytes keeps beside a four-bit parameter count."""
        from mango.optim.accounting import tensors_in

        scales = tensors_in([getattr(p, "quant_state", None) for p in self.model.parameters()])
        return _storage_bytes([*self.model.parameters(), *self.model.buffers(), *scales])

    def gradients(self) -> int:
        """Bytes of the gradients that exist now."""
        return _storage_bytes(p.grad for p in self.model.parameters() if p.grad is not None)

    def optimizer_state(self) -> int:
        """Bytes of every tensor that the optimizer keeps now."""
        from mango.optim.accounting import state_nbytes

        return 0 if self.optimizer is None else state_nbytes(self.optimizer)

    def layers(self) -> dict[str, Row]:
        """Module -> its own parameters and buffers, gradients, optimizer state and saved activations; a tied tensor counts in each."""
        from mango.optim.accounting import state_of, tensors_in

        found: dict[str, Row] = {}
        for name, module in self.model.named_modules():
            own = list(module.parameters(recurse=False))
            states = [] if self.optimizer is None else [state_of(self.optimizer, p) for p in own]
            row = {
                "parameters": _storage_bytes([*own, *module.buffers(recurse=False)]),
                "gradients": _storage_bytes(p.grad for p in own if p.grad is not None),
                "optimizer_state": sum(tensor.nbytes for tensor in tensors_in(states)),  # states of stacked layers view one storage
                "saved_activations": self.saved_by_layer.get(name, 0),
            }
            if any(row.values()):
                found[name] = row
        return found

    @contextmanager
    def activations(self) -> Iterator[None]:
        """Count the tensors that autograd saves inside this block, until the backward pass frees them."""
        begin = time.perf_counter()
        kept = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}

        def pack(tensor: Tensor) -> Tensor | _Saved:
            if tensor.untyped_storage().data_ptr() in kept or tensor.untyped_storage().nbytes() == 0:
                return tensor
            return _Saved(tensor, self)

        def leave(*_: object) -> None:  # a value would replace the module's output
            self._inside.pop()

        def arrive(grad: Tensor | None, parameter: nn.Parameter) -> None:
            begin = time.perf_counter()
            new = grad.nbytes if grad is not None and parameter.grad is None else 0  # else there is none, or it is added to what is there
            self.peak_gradients = max(self.peak_gradients, self.gradients() + new)
            self.seconds += time.perf_counter() - begin

        with ExitStack() as stack:
            for parameter in filter(lambda p: p.requires_grad, self.model.parameters()):
                stack.callback(parameter.register_hook(lambda grad, parameter=parameter: arrive(grad, parameter)).remove)
            for name, module in self.model.named_modules():
                stack.callback(module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor if isinstance(saved, _Saved) else saved)
            stack.enter_context(hooks)
            self.seconds += time.perf_counter() - begin
            yield
            self.peak_gradients = max(self.peak_gradients, self.gradients())  # gradients that were not autograd's to accumulate

    @contextmanager
    def step(self) -> Iterator[None]:
        """One training step. Gradients and states are counted at its end, activations at their peak, the device's peaks within it."""
        self._step_peak = self._bytes
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.activations():
            yield
        self.rows.append(self.categories(self._step_peak))

    def categories(self, saved: int) -> Row:
        """The bytes now, by category, with ``saved`` for the activations; what the device does not know is left out."""
        begin = time.perf_counter()
        allocated, reserved = device_peaks(self.device)
        row = {
            "parameters": self.parameters(),
            "gradients": self.gradients(),
            "optimizer_state": self.optimizer_state(),
            "saved_activations": saved,
            "rss": rss(),
        }
        if allocated is not None and reserved is not None:
            row |= {"device_peak_allocated": allocated, "device_peak_reserved": reserved}
        self.seconds += time.perf_counter() - begin
        return row

    def peaks(self) -> Row:
        """Category -> the largest of all rows."""
        return {category: max(row[category] for row in self.rows) for category in self.rows[0]} if self.rows else {}

    def medians(self) -> dict[str, float]:
        """Category -> the median of all rows."""
        return {category: median(row[category] for row in self.rows) for category in self.rows[0]} if self.rows else {}

    def write_csv(self, path: Path) -> None:
        """One line for each category: category, peak and median over the rows, in bytes."""
        write_csv(path, self.rows)

    def _add(self, tensor: Tensor) -> None:
        begin = time.perf_counter()
        storage = tensor.untyped_storage()
        views, layer = self._alive.get(storage.data_ptr(), (0, self._inside[-1]))
        self._alive[storage.data_ptr()] = views + 1, layer
        if views == 0:
            self._bytes += storage.nbytes()
            self._layer_bytes[layer] += storage.nbytes()
            self._step_peak = max(self._step_peak, self._bytes)
            self.saved_activations = max(self.saved_activations, self._bytes)
            self.saved_by_layer[layer] = max(self.saved_by_layer.get(layer, 0), self._layer_bytes[layer])
        self.seconds += time.perf_counter() - begin

    def _remove(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        views, layer = self._alive[storage.data_ptr()]
        if views > 1:
            self._alive[storage.data_ptr()] = views - 1, layer
        else:
            del self._alive[storage.data_ptr()]
            self._bytes -= storage.nbytes()
            self._layer_bytes[layer] -= storage.nbytes()


class _Saved:
    """A saved tensor that tells the ledger when autograd lets go of it."""

    __slots__ = ("ledger", "tensor")

    def __init__(self, tensor: Tensor, ledger: MemoryLedger) -> None:
        self.tensor = tensor
        self.ledger = ledger
        ledger._add(tensor)

    def __del__(self) -> None:
        self.ledger._remove(self.tensor)


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line for each category of the rows: category, peak and median, in bytes."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["category", "peak", "median"])
        for category in rows[0] if rows else ():
            values = [row[category] for row in rows]
            writer.writerow([category, max(values), median(values)])


def rss_peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rss() -> int:
    """Resident set of this process now, in bytes; where the system does not tell, its largest so far."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return rss_peak()
    from resource import getpagesize

    return int(statm.read_text().split()[1]) * getpagesize()


def device_peaks(device: torch.device) -> tuple[int, int] | tuple[None, None]:
    """Largest bytes allocated and reserved on a CUDA device so far; (None, None) elsewhere."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

"""One forward and backward pass on the meta device, and what is alive after each operation: true sizes, no memory, no arithmetic.

An operation's output has a storage of the right size and no data, so a model of any size can be followed on a laptop. Attention is sent to
the fused kernel: the meta device would take the unfused path, which keeps the (sequence, sequence) matrix that no trainer's GPU keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mango.errors import ConfigError

Pass = Callable[[Callable[..., Any]], Tensor]  # given the model as a function of its inputs, the scalar loss


@dataclass(frozen=True)
class Trace:
    """Bytes alive after each event, parameters, buffers and inputs left out; all arrays are (events,) int64.

    Attributes:
        live: everything.
        saved: what autograd keeps for the backward pass.
        grads: gradients that were complete before.
        stepping: 1 where a gradient has become complete, so that a fused optimizer steps; elsewhere 0, after an operation.
    """

    live: np.ndarray
    saved: np.ndarray
    grads: np.ndarray
    stepping: np.ndarray

    @cached_property
    def activations(self) -> int:
        """The most that autograd keeps at one time."""
        return int(self.saved.max(initial=0))

    def temporary(self, step: int = 0) -> int:
        """The most that is alive at one time and neither saved nor a complete gradient, when a fused step holds ``step`` bytes."""
        return int((self.live - self.saved - self.grads + step * self.stepping).max(initial=0))

    def peak(self) -> int:
        """The most that is alive at one time, when gradients are kept."""
        return int(self.live.max(initial=0))

    def fused_peak(self, step: int = 0) -> int:
        """The same when each gradient is freed by a step that holds ``step`` bytes."""
        return int((self.live - self.grads + step * self.stepping).max(initial=0))


class Watch(TorchDispatchMode):
    """Counts the storages that operations create, each once, from their creation to their release, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.saved, self.grads = 0, 0, 0
        self.samples: list[tuple[int, int, int, int]] = []
        self._known: set[int] = set()  # addresses of C++ objects: a meta storage has no address of data
        self._views: dict[int, int] = {}  # saved storage -> how many saved tensors view it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        self.samples.append((self.live, self.saved, self.grads, 0))
        return out

    def ignore(self, tensor: Tensor) -> None:
        """Leave a tensor that existed before out of the count."""
        self._known.add(_key(tensor))

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what autograd saves inside the block, until the backward pass lets go of it."""
        kept = set(self._known)

        def pack(tensor: Tensor) -> Tensor | _Saved:
            return tensor if _key(tensor) in kept or tensor.untyped_storage().nbytes() == 0 else _Saved(tensor, self)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor if isinstance(saved, _Saved) else saved):
            yield

    def complete(self, parameter: Tensor) -> None:
        """A parameter's gradient has been accumulated."""
        if parameter.grad is not None:
            self.samples.append((self.live, self.saved, self.grads, 1))
            self.grads += parameter.grad.untyped_storage().nbytes()

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def _hold(self, tensor: Tensor, sign: int) -> None:
        key = _key(tensor)
        before = self._views.get(key, 0)
        self._views[key] = before + sign
        if before == 0 or self._views[key] == 0:
            self.saved += sign * tensor.untyped_storage().nbytes()


class _Saved:
    """A saved tensor that tells the watch when autograd lets go of it."""

    __slots__ = ("tensor", "watch")

    def __init__(self, tensor: Tensor, watch: Watch) -> None:
        self.tensor, self.watch = tensor, watch
        watch._hold(tensor, 1)

    def __del__(self) -> None:
        self.watch._hold(self.tensor, -1)


def trace(model: nn.Module, run: Pass, dtype: torch.dtype | None = None) -> Trace:
    """Follow one forward and backward pass.

    Args:
        model: on any device; it is neither run nor changed, its parameters and buffers are stood in for.
        run: computes the loss from the model's stand-in; its inputs are to be on the meta device.
        dtype: of floating-point parameters; None leaves each as it is.

    Raises: ConfigError for a model that reads values, which the meta device does not have.
    """
    stand_ins: dict[int, Tensor] = {}
    names: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) not in stand_ins:
            kind = dtype if dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor.dtype
            stand_ins[id(tensor)] = torch.empty(tensor.shape, dtype=kind, device="meta").requires_grad_(tensor.requires_grad)
        names[name] = stand_ins[id(tensor)]
    watch = Watch()
    for tensor in stand_ins.values():
        watch.ignore(tensor)
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(watch.complete)
    try:
        with fused_attention(), watch, watch.saving():
            loss = run(lambda *args, **kwargs: torch.func.functional_call(model, names, args, kwargs))
            loss.backward()
    except RuntimeError as error:
        if "meta" not in str(error).lower():
            raise
        legal = f"one whose operations do not depend on values, which the meta device does not have ({str(error).splitlines()[0]})"
        raise ConfigError.of("model", type(model).__name__, legal) from error
    watch.samples.append((watch.live, watch.saved, watch.grads, 0))
    return Trace(*np.array(watch.samples, dtype=np.int64).reshape(-1, 4).T)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention on the meta device keeps q, k, v, the output and one number a query, as the fused kernels do."""
    original = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        if not query.is_meta:
            return original(query, key, value, attn_mask, dropout_p, is_causal, **more)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        # the schema is the one whose backward the meta device has; it takes fewer heads of key and value, as the kernels do
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=more.get("scale"))[0]

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

"""EF21: error feedback by sending compressed *changes* of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from mango import codecs
from mango.codecs.base import Codec
from mango.compressors.base import Compressor
from mango.errors import ConfigError
from mango.feedback import rates
from mango.feedback.base import Feedback, Gradient, Message, check_gradients
from mango.packed import Packed


class EF21(Feedback):
    """Each worker keeps an estimate of its own gradient and sends the compressed difference; the server keeps the mean.

    Compressing the gradient itself is biased for ever (and diverges, T5's control); the *difference* goes to zero as the method
    converges, and its compression error with it.

    .. math:: g_i \\leftarrow g_i + C(\\nabla f_i(x) - g_i), \\qquad g = \\frac1n \\sum_i g_i, \\qquad x \\leftarrow x - \\gamma g

    Args:
        compressor: contractive, ``alpha(shape) > 0``.
        state: how g_i is kept: "fp32" (exact: the gradient's precision, fp32 at least), or a codec, by name or instance. A codec rounds
            the state with relative error rho at each step, g_i <- R(g_i + C(...)), and must satisfy T5: a = (1 + rho) sqrt(1 - alpha) < 1
            and kappa = 2 rho^2 / (1 - a)^2 < 1. The server then keeps every worker's rounded state, since their mean has no recursion.
        unsafe: skip that check.
        seed: of the compressors' and codecs' draws.

    Raises:
        ConfigError: from the first message of a shape, when the compressor and the state are not admissible together, with the numbers.
        NonFinite: when a gradient holds NaN or infinity; the state is then unchanged.

    Source: Richtárik, Sokolov, Fatkhullin 2021, arXiv:2106.05203, started from g_i = 0, so that the first message is C(gradient). Exact
    gradients only; with minibatches use EF21SGDM. The quantised state is not in the paper.
    """

    name: ClassVar[str] = "ef21"

    def __init__(self, compressor: Compressor, state: str | Codec = "fp32", *, unsafe: bool = False, seed: int = 0) -> None:
        super().__init__(compressor, seed=seed, unsafe=unsafe)
        self.codec: Codec | None = None if state == "fp32" else codecs.get(state) if isinstance(state, str) else state
        self._states: dict[int, list[Tensor | Packed]] = {}  # worker -> its g_i, one per tensor
        self._admitted: set[tuple[torch.Size, torch.dtype]] = set()

    def use(self, compressor: Compressor) -> None:
        super().use(compressor)
        self._admitted.clear()

    def admission(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> rates.QuantisedState:
        """T5's a and kappa for tensors of this shape; ``.admissible`` is the condition."""
        rho = 0.0
        if self.codec is not None:
            omega = self.codec.omega(dtype)
            rho = min(sqrt(1.0 - self.codec.alpha(dtype)), sqrt(omega) if omega is not None else 1.0)
        return rates.quantised_state(self.compressor.alpha(shape, dtype), rho)

    def tracked(self, worker: int = 0) -> list[Tensor]:
        """g_worker as this object keeps it, one tensor per parameter; empty before its first message."""
        return [tensor.clone() for tensor in self._read(worker, [])]

    def message(self, gradient: Gradient, worker: int = 0) -> Message:
        """The worker's half: updates g_worker and returns what is sent."""
        for tensor in [gradient] if isinstance(gradient, Tensor) else gradient:
            self._admit(tensor.shape, _wide(tensor.dtype))
        targets = [self._target(worker, i, t.to(_wide(t.dtype))) for i, t in enumerate(self._opened(gradient, worker))]
        states = self._read(worker, targets)
        payloads = []
        for index, (target, state) in enumerate(zip(targets, states, strict=True)):
            compressor = self._copy(worker, index)
            payloads.append(compressor.compress(target - state, generator=self._generator(target.device, worker, index)))
        self._advance(worker, states, payloads)
        return self._message(worker, gradient, payloads)

    def absorb(self, messages: Sequence[Message]) -> Gradient:
        rows = self._unpacked(messages)
        if self.codec is None:
            means = [torch.stack([self.compressor.decompress(p) for p in column]).mean(0) for column in zip(*rows, strict=True)]
            if not self._estimate:
                self._estimate = [torch.zeros_like(mean) for mean in means]
            for estimate, mean in zip(self._estimate, means, strict=True):
                estimate += mean
        else:
            for worker, payloads in enumerate(rows):
                if worker not in self._sent:  # another rank's worker: replay its update on the replica kept here
                    template = [torch.empty(p.shape, dtype=p.dtype, device=next(p.tensors()).device) for p in payloads]
                    self._advance(worker, self._read(worker, template), payloads)
            states = [self._read(worker, []) for worker in range(len(rows))]
            self._estimate = [torch.stack(column).mean(0) for column in zip(*states, strict=True)]
        return self._closed()

    def step(self, gradients: Sequence[Gradient]) -> Gradient:
        """A round in one process: the i-th gradient is worker i's; returns the new estimate of their mean, in fp32 at least."""
        check_gradients(gradients)
        return self.absorb([self.message(gradient, worker) for worker, gradient in enumerate(gradients)])

    def state_dict(self) -> dict[str, Any]:
        states = {worker: [[t.clone() for t in _stored(s)] for s in kept] for worker, kept in self._states.items()}
        return super().state_dict() | {"states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._states = {}
        for worker, kept in state["states"].items():
            if self.codec is None:
                self._states[worker] = [tensors[0].clone() for tensors in kept]
                continue
            slots = [self.codec.encode(torch.zeros_like(estimate)) for estimate in self._estimate]
            for slot, tensors in zip(slots, kept, strict=True):
                for target, source in zip(slot.tensors(), tensors, strict=True):
                    target.copy_(source)
            self._states[worker] = list(slots)

    def _tensors(self) -> list[Tensor]:
        return super()._tensors() + [tensor for kept in self._states.values() for s in kept for tensor in _stored(s)]

    def _target(self, worker: int, index: int, gradient: Tensor) -> Tensor:
        """What the worker's state follows: here the gradient itself."""
        return gradient

    def _codec(self) -> Codec:
        assert self.codec is not None
        return self.codec

    def _read(self, worker: int, like: Sequence[Tensor]) -> list[Tensor]:
        """g_worker as tensors, zeros before the first round."""
        if worker not in self._states:
            return [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in like]
        return [s if isinstance(s, Tensor) else self._codec().decode(s) for s in self._states[worker]]

    def _advance(self, worker: int, states: list[Tensor], payloads: list[Packed]) -> None:
        """g <- R(g + C); on a replica with the same draws as on the worker itself."""
        moved = [state + self.compressor.decompress(payload) for state, payload in zip(states, payloads, strict=True)]
        if self.codec is None:
            self._states[worker] = list(moved)
            return
        slots = self._states.get(worker, [None] * len(moved))  # overwritten where they exist
        self._states[worker] = [
            self.codec.encode(m, generator=self._generator(m.device, worker, i, 1), out=slot if isinstance(slot, Packed) else None)
            for i, (m, slot) in enumerate(zip(moved, slots, strict=True))
        ]

    def _admit(self, shape: torch.Size, dtype: torch.dtype) -> None:
        if self.unsafe or (shape, dtype) in self._admitted:
            return
        verdict = self.admission(shape, dtype)
        if not verdict.admissible:
            alpha = self.compressor.alpha(shape, dtype)
            kept = "fp32" if self.codec is None else self.codec.name
            raise ConfigError.of(
                "compressor and state",
                f"{self.compressor.name} (alpha = {alpha:.4g} on {tuple(shape)}) with a {kept} state",
                f"a = (1 + rho) sqrt(1 - alpha) < 1 and kappa = 2 rho^2 / (1 - a)^2 < 1, here a = {verdict.a:.4g} and "
                f"kappa = {verdict.kappa:.4g}; unsafe=True goes on without a guarantee",
            )
        self._admitted.add((shape, dtype))


class EF21SGDM(EF21):
    """EF21 for stochastic gradients: the state follows a momentum average of them.

    With minibatch noise EF21 sends mostly noise, which the compressor then distorts; averaging first makes any batch size converge.

    .. math:: v_i \\leftarrow (1 - \\eta) v_i + \\eta \\nabla f_i(x, \\xi_i), \\qquad g_i \\leftarrow g_i + C(v_i - g_i)

    Args:
        momentum: eta in (0, 1], the weight of the *new* gradient; 1 gives EF21. v_i starts as the first gradient.
        compressor, state, unsafe, seed: as in EF21.

    Source: Fatkhullin, Tyurin, Richtárik 2023, arXiv:2305.15155, Algorithm 1. v_i is kept in fp32 at least.
    """

    name: ClassVar[str] = "ef21sgdm"

    def __init__(
        self, compressor: Compressor, momentum: float = 0.1, state: str | Codec = "fp32", *, unsafe: bool = False, seed: int = 0
    ) -> None:
        super().__init__(compressor, state, unsafe=unsafe, seed=seed)
        if not 0.0 < momentum <= 1.0:
            raise ConfigError.of("momentum", momentum, "in (0, 1]")
        self.momentum = momentum
        self._averages: dict[int, dict[int, Tensor]] = {}  # worker -> tensor index -> v

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"averages": {worker: dict(kept) for worker, kept in self._averages.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._averages = {worker: {i: v.clone() for i, v in kept.items()} for worker, kept in state["averages"].items()}

    def _tensors(self) -> list[Tensor]:
        return super()._tensors() + [v for kept in self._averages.values() for v in kept.values()]

    def _target(self, worker: int, index: int, gradient: Tensor) -> Tensor:
        kept = self._averages.setdefault(worker, {})
        kept[index] = gradient.clone() if index not in kept else kept[index].lerp_(gradient, self.momentum)
        return kept[index]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The gradient's dtype, fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _stored(state: Tensor | Packed) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state.tensors())

"""MARINA, VR-MARINA and Byz-VR-MARINA: unbiased compression of gradient differences, with a full gradient now and then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mango.compressors import Identity
from mango.compressors.base import Compressor
from mango.errors import ConfigError
from mango.feedback.aggregators import Aggregator, Mean
from mango.feedback.base import Feedback, Gradient, Message, check_gradients

Attack = Callable[[Tensor], Tensor]  # (n, d) messages as the protocol asks -> (n, d) as received


class VRMarina(Feedback):
    """With probability p all workers send full gradients, else compressed differences of minibatch gradients at two points.

    .. math:: g^+ = \\begin{cases} \\frac1n \\sum_i \\nabla f_i(x^+) & \\text{with probability } p \\\\
              g + \\frac1n \\sum_i C_i(\\nabla f_{i,B}(x^+) - \\nabla f_{i,B}(x)) & \\text{otherwise} \\end{cases}

    The coin is common: ask ``full`` before each round. On a full round pass full gradients; otherwise gradients of one minibatch at the
    new point, and of the *same* minibatch at the point before as ``previous``. The first round is always full.

    Args:
        compressor: unbiased (RandK, a stochastic codec, natural compression); the workers' draws are independent, as the theorem asks.
        probability: p in (0, 1]; the compressed size over the full one balances the two kinds of rounds.
        seed: of the coin and the compressors.
        unsafe: accept a biased compressor, whose errors add up instead of cancelling (T6's control).

    Source: Gorbunov, Burlachenko, Li, Richtárik 2021, arXiv:2102.07845, Algorithm 2.
    """

    name: ClassVar[str] = "vrmarina"

    def __init__(self, compressor: Compressor, probability: float, *, seed: int = 0, unsafe: bool = False) -> None:
        super().__init__(compressor, seed=seed, unsafe=unsafe)
        if not 0.0 < probability <= 1.0:
            raise ConfigError.of("probability", probability, "in (0, 1]")
        self._check(compressor)
        self.probability = probability
        self.aggregator: Aggregator = Mean()
        self._plain = Identity()

    @property
    def full(self) -> bool:
        """Whether the coming round asks for full gradients; the same on every rank."""
        return self.round == 0 or self._draw(-1) < self.probability * 2.0**48

    def use(self, compressor: Compressor) -> None:
        self._check(compressor)
        super().use(compressor)

    def message(self, gradient: Gradient, previous: Gradient | None = None, worker: int = 0) -> Message:
        """The worker's half.

        Args:
            gradient: at the new point; full when ``full``, else of a minibatch.
            previous: of the same minibatch at the point before; not used when ``full``.

        Raises:
            ConfigError: ``previous`` is missing on a compressed round, or its shapes differ.
            NonFinite: the gradient holds NaN or infinity.
        """
        if self.full:
            return self._message(worker, gradient, [self._plain.compress(tensor) for tensor in self._opened(gradient, worker)])
        if previous is None:
            raise ConfigError.of("previous", None, "on a compressed round, the same minibatch's gradient at the point before")
        check_gradients([gradient, previous])
        before = [previous] if isinstance(previous, Tensor) else list(previous)
        payloads = [
            self._copy(worker, index).compress(new - old.detach(), generator=self._generator(new.device, worker, index))
            for index, (new, old) in enumerate(zip(self._opened(gradient, worker), before, strict=True))
        ]
        return self._message(worker, gradient, payloads)

    def absorb(self, messages: Sequence[Message], attack: Attack | None = None) -> Gradient:
        """The server's half.

        Args:
            attack: applied to what is received, to study it (mango.feedback.attacks).
        """
        payloads = self._unpacked(messages)
        decode = self._plain.decompress if self.full else self.compressor.decompress
        rows = torch.stack([torch.cat([decode(packed).reshape(-1) for packed in row]) for row in payloads])  # (n, d)
        if attack is not None:
            rows = attack(rows)
        # every aggregator commutes with translations: aggregating g + m_i is g plus the aggregate of the messages m_i
        combined = self.aggregator(rows, generator=self._generator(rows.device, -2))
        shapes = [packed.shape for packed in payloads[0]]
        parts = [part.reshape(shape) for part, shape in zip(combined.split([s.numel() for s in shapes]), shapes, strict=True)]
        self._estimate = parts if self.full else [old + part for old, part in zip(self._estimate, parts, strict=True)]
        return self._closed()

    def step(self, gradients: Sequence[Gradient], previous: Sequence[Gradient] | None = None, *, attack: Attack | None = None) -> Gradient:
        """A round in one process: the i-th gradient is worker i's; returns the new estimate of their mean."""
        check_gradients(gradients)
        if previous is not None and len(previous) != len(gradients):
            raise ConfigError.of("len(previous)", len(previous), f"one per worker, {len(gradients)}")
        before: Sequence[Gradient | None] = [None] * len(gradients) if previous is None else previous
        return self.absorb([self.message(g, b, i) for i, (g, b) in enumerate(zip(gradients, before, strict=True))], attack)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"dropped": self.aggregator.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.aggregator.dropped = state["dropped"]

    def _check(self, compressor: Compressor) -> None:
        if not (self.unsafe or compressor.unbiased):
            raise ConfigError.of(
                "compressor", compressor.name, "an unbiased one (RandK, stochastic codecs, Natural): the errors of a biased one add up"
            )


class Marina(VRMarina):
    """MARINA: VR-MARINA with exact gradients, kept by each worker from one round to the next, so ``previous`` is never passed.

    Source: Gorbunov, Burlachenko, Li, Richtárik 2021, arXiv:2102.07845, Algorithm 1. Memory: one gradient per worker.
    """

    name: ClassVar[str] = "marina"

    def __init__(self, compressor: Compressor, probability: float, *, seed: int = 0, unsafe: bool = False) -> None:
        super().__init__(compressor, probability, seed=seed, unsafe=unsafe)
        self._last: dict[int, list[Tensor]] = {}  # worker -> its gradient at the point before

    def message(self, gradient: Gradient, previous: Gradient | None = None, worker: int = 0) -> Message:
        if previous is not None:
            raise ConfigError.of("previous", "a gradient", "None: Marina keeps it itself; VRMarina takes it")
        sent = super().message(gradient, self._last.get(worker), worker)
        self._last[worker] = [tensor.detach().clone() for tensor in ([gradient] if isinstance(gradient, Tensor) else gradient)]
        return sent

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last": {worker: [t.clone() for t in kept] for worker, kept in self._last.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._last = {worker: [t.clone() for t in kept] for worker, kept in state["last"].items()}

    def _tensors(self) -> list[Tensor]:
        return super()._tensors() + [t for kept in self._last.values() for t in kept]


class ByzVRMarina(VRMarina):
    """VR-MARINA with a robust aggregator: variance reduction takes away the noise in which attackers hide.

    Args:
        aggregator: from mango.feedback.aggregators, with its ``delta`` (and ``bucket``).
        compressor, probability, seed, unsafe: as in VRMarina.

    Source: Gorbunov, Horváth, Richtárik, Gidel 2022, arXiv:2206.00529. ``aggregator.dropped`` counts the non-finite messages.
    """

    name: ClassVar[str] = "byzvrmarina"

    def __init__(self, compressor: Compressor, probability: float, aggregator: Aggregator, *, seed: int = 0, unsafe: bool = False) -> None:
        super().__init__(compressor, probability, seed=seed, unsafe=unsafe)
        if not isinstance(aggregator, Aggregator):
            raise ConfigError.of("aggregator", aggregator, "an instance of a class in mango.feedback.aggregators")
        self.aggregator = aggregator

"""What every feedback method shares: rounds, messages, reproducible randomness, state of tensors and plain numbers.

A *gradient* is a tensor or a list of tensors (one per parameter); a *message* is what is sent instead: a Packed, or a list of them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, ClassVar

import torch
from torch import Tensor

from mango.compressors import LRQ, LowRank
from mango.compressors.base import Compressor
from mango.errors import ConfigError, NonFinite
from mango.packed import Packed

Gradient = Tensor | Sequence[Tensor]
Message = Packed | Sequence[Packed]


class Feedback(ABC):
    """One synchronous round: every worker makes one message, then everybody absorbs all of them, in the workers' order.

    In one process ``step(gradients)`` does the round. Across processes each rank calls ``message(gradient, worker=rank)``, the messages
    are gathered, and each rank calls ``absorb(messages)``; all ranks then hold the same estimate, because every random choice is a
    function of (seed, round, worker, tensor).

    Args:
        compressor: copied for each worker and tensor, so that one with a memory of its own (a warm-started basis) is never shared.
        seed: of every random choice; the same on all ranks.
        unsafe: accept what the theory does not cover.
    """

    name: ClassVar[str]

    def __init__(self, compressor: Compressor, *, seed: int = 0, unsafe: bool = False) -> None:
        if not isinstance(compressor, Compressor):
            raise ConfigError.of("compressor", compressor, "an instance of a class in mango.compressors")
        self.compressor = compressor
        self.seed = seed
        self.unsafe = unsafe
        self.round = 0
        self._copies: dict[tuple[int, int], Compressor] = {}
        self._sent: set[int] = set()  # workers whose message of this round is out
        self._estimate: list[Tensor] = []
        self._single = True  # gradients are single tensors, not lists

    @abstractmethod
    def absorb(self, messages: Sequence[Message]) -> Gradient:
        """The server's half: all workers' messages in, the new estimate of the mean gradient out."""

    @property
    def estimate(self) -> Gradient:
        """The estimate of the mean gradient that the last round gave; its tensors are the caller's to change."""
        tensors = [tensor.clone() for tensor in self._estimate]
        return tensors[0] if self._single and tensors else tensors

    def use(self, compressor: Compressor) -> None:
        """Compress with another operator from this round on; choose it before the round's draws (T7), and alike on all ranks."""
        self.compressor = compressor
        self._copies.clear()

    def nbytes(self) -> int:
        """Bytes of every tensor kept between rounds by this object, the compressors' warm bases included."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers in plain containers; taken between rounds, it resumes bit for bit."""
        return {
            "round": self.round,
            "single": int(self._single),
            "estimate": [tensor.clone() for tensor in self._estimate],
            "bases": [[worker, index, columns, basis.clone()] for worker, index, columns, basis in self._bases()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an object built with the same arguments."""
        self.round, self._single = state["round"], bool(state["single"])
        self._estimate = [tensor.clone() for tensor in state["estimate"]]
        self._sent.clear()
        self._copies.clear()
        for worker, index, columns, basis in state["bases"]:
            compressor = self._copy(worker, index)
            assert isinstance(compressor, LowRank | LRQ)
            compressor.directions.warm[(basis.shape[0], columns, basis.device)] = basis.clone()

    def _tensors(self) -> list[Tensor]:
        """Every tensor kept between rounds."""
        return [*self._estimate, *(basis for *_, basis in self._bases())]

    def _bases(self) -> list[tuple[int, int, int, Tensor]]:
        """(worker, tensor, columns of the folded tensor, basis) of every copy whose compressor keeps a warm basis."""
        return [
            (worker, index, columns, basis)
            for (worker, index), compressor in self._copies.items()
            if isinstance(compressor, LowRank | LRQ)
            for (_, columns, _), basis in compressor.directions.warm.items()
        ]

    def _opened(self, gradient: Gradient, worker: int) -> list[Tensor]:
        """The gradient's tensors, checked."""
        if worker in self._sent:
            raise ConfigError.of("worker", worker, "one message a round from each worker; absorb the round first")
        tensors = [gradient] if isinstance(gradient, Tensor) else list(gradient)
        for index, tensor in enumerate(tensors):
            if not tensor.is_floating_point():
                raise ConfigError.of("gradient dtype", str(tensor.dtype), "a real floating-point dtype")
            if not torch.isfinite(tensor).all():
                raise NonFinite(f"gradient {index} of worker {worker} is not finite in round {self.round}: its message was not sent")
        return [tensor.detach() for tensor in tensors]

    def _message(self, worker: int, gradient: Gradient, payloads: list[Packed]) -> Message:
        """Mark the worker's message as sent; it has the gradient's structure: a payload for a tensor, a list for a list."""
        self._sent.add(worker)
        return payloads[0] if isinstance(gradient, Tensor) else payloads

    def _closed(self) -> Gradient:
        """End the round."""
        self._sent.clear()
        self.round += 1
        return self.estimate

    def _copy(self, worker: int, index: int) -> Compressor:
        key = (worker, index)
        if key not in self._copies:
            self._copies[key] = copy.deepcopy(self.compressor)
        return self._copies[key]

    def _generator(self, device: torch.device, *key: int) -> torch.Generator:
        """A generator that depends on (seed, round, key) alone: nothing has to be saved, and replicas on other ranks draw the same."""
        return torch.Generator(device=device).manual_seed(self._draw(*key))

    def _draw(self, *key: int) -> int:
        """48 bits that depend on (seed, round, key) alone."""
        return int.from_bytes(blake2b(repr((self.seed, self.round, key)).encode(), digest_size=6).digest(), "little")

    def _unpacked(self, messages: Sequence[Message]) -> list[list[Packed]]:
        """Messages as one list of payloads per worker, with shapes that agree."""
        if not messages:
            raise ConfigError.of("messages", [], "one message per worker, at least one")
        self._single = isinstance(messages[0], Packed)
        rows = [[message] if isinstance(message, Packed) else list(message) for message in messages]
        check_alike([[packed.shape for packed in row] for row in rows])
        if self._estimate and [packed.shape for packed in rows[0]] != [tensor.shape for tensor in self._estimate]:
            raise ConfigError.of("shapes", [tuple(packed.shape) for packed in rows[0]], "those of the earlier rounds")
        return rows


def check_alike(shapes: Sequence[Sequence[torch.Size]]) -> None:
    """Raises: ConfigError naming the first worker whose shapes differ from worker 0's."""
    for worker, row in enumerate(shapes):
        if list(row) != list(shapes[0]):
            raise ConfigError.of(
                f"shapes of worker {worker}", [tuple(s) for s in row], f"those of worker 0, {[tuple(s) for s in shapes[0]]}"
            )


def check_gradients(gradients: Sequence[Gradient]) -> None:
    """Raises: ConfigError unless there is one gradient per worker and all have the same shapes; before any state has changed."""
    if isinstance(gradients, Tensor) or not gradients:
        raise ConfigError.of("gradients", type(gradients).__name__, "a list with one gradient per worker, at least one")
    check_alike([[g.shape] if isinstance(g, Tensor) else [tensor.shape for tensor in g] for g in gradients])

"""Episodes by number, in this process or in several; each is kept as it ends, so a run that is killed loses only those under way."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import torch

from mango.errors import ConfigError
from mango.policy.ppo import Environment, Episode, rollout
from mango.policy.tinyformer import LearnedPolicy
from mango.training import atomic

SEEDS = 1_000_003  # between the generators of two seeds


@dataclass(frozen=True)
class Episodes:
    """Collects episodes one after the other; each draws from a generator of its own, so it is a function of policy and number.

    Args:
        make: the environment of an episode.
        seed: of the draws.
        folder: where finished episodes are kept until the next collection; None = nowhere. One that other weights played is not taken up.
    """

    make: Callable[[int], Environment]
    seed: int = 0
    folder: Path | None = None

    def __call__(self, policy: LearnedPolicy, numbers: Sequence[int]) -> list[Episode]:
        self.forget(numbers)
        return [self.one(policy, number) for number in numbers]

    def forget(self, numbers: Sequence[int]) -> None:
        """Drop what is kept of other collections."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            wanted = {f"{number}.pt" for number in numbers}
            for path in self.folder.iterdir():
                if path.name not in wanted:
                    path.unlink()

    def one(self, policy: LearnedPolicy, number: int) -> Episode:
        """The episode of this number, as it was kept or played now."""
        path = None if self.folder is None else self.folder / f"{number}.pt"
        mark = weights_hash(policy)
        if path is not None and path.is_file():
            kept = torch.load(path, weights_only=True)
            if kept["weights"] == mark:
                return Episode(**kept["episode"])
        episode = rollout(policy, self.make(number), torch.Generator().manual_seed(self.seed * SEEDS + number))
        if path is not None:
            content = io.BytesIO()
            torch.save({"weights": mark, "episode": asdict(episode)}, content)
            atomic.write(path, lambda file: file.write(content.getvalue()))
        return episode


class Workers:
    """Collects the same episodes in processes, which keep their modules and data sets from one to the next.

    Args:
        episodes: what is collected; its ``make`` must be a function of a module, or a partial of one, so that processes can import it.
        count: processes, one thread each.

    Raises: ConfigError for a number that is not legal.
    """

    def __init__(self, episodes: Episodes, count: int) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError.of("workers", count, "an integer >= 1")
        self.episodes, self.count = episodes, count

    def __enter__(self) -> Self:
        self._pool = ProcessPoolExecutor(self.count, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, policy: LearnedPolicy, numbers: Sequence[int]) -> list[Episode]:
        self.episodes.forget(numbers)
        sent = pickle.dumps(policy)  # by value: shared memory would need a file descriptor for each tensor
        return [pickle.loads(found) for found in self._pool.map(_play, [(self.episodes, sent, number) for number in numbers])]


def _play(job: tuple[Episodes, bytes, int]) -> bytes:
    episodes, sent, number = job
    return pickle.dumps(episodes.one(pickle.loads(sent), number))  # from the process that started this one


def weights_hash(policy: LearnedPolicy) -> str:
    """Of everything that an episode depends on in a policy, the running normalisation included."""
    total = hashlib.sha256()
    for name, tensor in policy.state_dict().items():
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()

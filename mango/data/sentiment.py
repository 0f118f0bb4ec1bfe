"""Verdicts on movie reviews: windows that end in one prompt, and the one byte or token after it; stand-in: Python's prose or code."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mango.data.base import Progress, cut, derive, identity_of
from mango.data.reviews import Reviews, archive, bare
from mango.data.stdlib import PythonDocs, documents
from mango.data.text import VOCABULARY
from mango.data.tokenizer import Tokenizer
from mango.errors import ConfigError

PROMPT = b"\nVerdict: "
BAD, GOOD = b"n", b"y"  # frequent in any text: a frozen head gives little weight to what it seldom saw, and factors could not answer
REACH = 256  # bytes or tokens before a review's end in which a training window may end
TEST_SHARE = 5  # the last fifth of the reviews is the test split
REPEAT = 512  # bytes that two copies of a review have in common at their ends; signatures are shorter
MODULES = 80  # of the stand-in: enough, and read in seconds


@dataclass(frozen=True)
class SentimentData:
    """Reviews whose verdict is to be predicted after their last words.

    Attributes:
        name, title, source: as for ``mango.data.text.TextData``.
        splits: "train", "test" and, when asked for, "validation": (n, REACH + sequence + 1) int32 each. A row is the end of a review,
            padded on the left with the prompt's first unit (a newline) where the review is shorter, the prompt and the verdict.
        sequence: bytes or tokens in a window, those of the prompt among them.
        prompt: bytes or tokens of the prompt.
        tokenizer: from text to tokens and back; None = bytes.
    """

    name: str
    title: str
    source: str
    splits: dict[str, Tensor]
    sequence: int
    prompt: int
    tokenizer: Tokenizer | None = None
    unit: str = field(default="reviews", init=False)

    def to(self, device: torch.device) -> SentimentData:
        return replace(self, splits={name: split.to(device) for name, split in self.splits.items()})

    def model_arguments(self) -> dict[str, int]:
        return {"vocabulary": VOCABULARY if self.tokenizer is None else len(self.tokenizer)}

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """``size`` reviews drawn with replacement, each up to a place drawn in its last ``REACH`` units, and the prompt.

        Returns: inputs (size, sequence) and the verdicts (size, 1), int64 each.
        """
        train = self.splits["train"]
        generator = torch.Generator().manual_seed(derive(seed, "reviews", step))
        rows = train[torch.randint(len(train), (size,), generator=generator).to(train.device)]
        review, asked = rows[:, : -self.prompt - 1], rows[:, -self.prompt - 1 :]
        padding = (review == asked[:, :1]).long().cumprod(1).sum(1)
        slack = (REACH - padding).clamp(min=0)  # no window begins before its review does, unless it is padded at the review's end too
        starts = REACH - (torch.rand(size, generator=generator).to(train.device) * (slack + 1)).long()
        places = starts[:, None] + torch.arange(self.sequence - self.prompt, device=train.device)
        return torch.cat([review.gather(1, places), asked[:, :-1]], 1).long(), asked[:, -1:].long()

    def evaluation(self, split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every review once, up to its end."""
        for rows in self.splits[split].split(size):
            yield rows[:, REACH:-1].long(), rows[:, -1:].long()

    def scores(self, split: str, loss: float, accuracy: float) -> dict[str, float]:
        """Share of the verdicts that are the model's likeliest unit, of its whole vocabulary."""
        return {"accuracy": accuracy}

    def files(self) -> dict[str, str]:
        return {} if self.tokenizer is None else {"tokenizer.json": self.tokenizer.text}

    def encode(self, text: str) -> Tensor:
        """A text's bytes or tokens, (n,) int64."""
        return torch.from_numpy(units(text.encode(), self.tokenizer)).long()

    def decode(self, tokens: Tensor) -> str:
        """The text of bytes or tokens (n,); bytes that are no whole character become U+FFFD."""
        return bytes(tokens.tolist()).decode(errors="replace") if self.tokenizer is None else self.tokenizer.decode(tokens.tolist())

    def identity(self) -> dict[str, str | int | float]:
        """With the share of the test split's larger class, which is what a constant answer reaches."""
        test = self.splits["test"][:, -1]
        majority = float(test.unique(return_counts=True)[1].max()) / len(test)
        digests = [hashlib.sha256(split.cpu().numpy().tobytes()).hexdigest() for split in self.splits.values()]
        return identity_of(self, digests) | {"majority": majority}


def units(text: bytes, tokenizer: Tokenizer | None) -> NDArray[np.int32]:
    """A text as bytes or tokens, (n,)."""
    content = np.frombuffer(text, np.uint8)
    return content.astype(np.int32) if tokenizer is None else np.concatenate(list(tokenizer.encode(content)))


class SentimentSource(ABC):
    """Texts with verdicts."""

    title: str

    @abstractmethod
    def key(self) -> str: ...

    @abstractmethod
    def texts(self) -> Iterator[tuple[bytes, bytes]]:
        """(text, verdict) in the order of a hash of the texts' names. Raises: DataError when they are damaged."""

    def load(
        self,
        name: str,
        used: str,
        train: int | None = None,
        test: int | None = None,
        validation: int = 0,
        progress: Progress | None = None,
        sequence: int = 192,
        tokenizer: Path | None = None,
    ) -> SentimentData:
        """The splits, in the order train, validation, test. Good and bad reviews take turns, so that each split holds as many of both, to
        one review; what the larger class has more is left out, and so is a review that ends as an earlier one does: some were posted
        twice, and would lie in two splits.

        Args:
            train, test, validation: reviews of each; None = all: the last fifth for test, all before it and the validation for train.
                Fewer test reviews are the first of that fifth, fewer training reviews the last before validation.
            sequence: bytes or tokens in a window, the prompt's among them.
            tokenizer: file of a tokenizer, as the ``tokenizers`` library saves it; None = bytes.

        Raises: ConfigError when more is asked for than there is, a window has no room for a review, or a tokenizer does not tell the two
            verdicts apart.
        """
        reader = None if tokenizer is None else Tokenizer(tokenizer.read_text())
        prompt, verdicts = units(PROMPT, reader), {verdict: units(verdict, reader)[-1:] for verdict in (BAD, GOOD)}
        if np.array_equal(verdicts[BAD], verdicts[GOOD]):
            raise ConfigError.of("tokenizer", str(tokenizer), "one with different tokens for n and y")
        room = REACH + sequence - len(prompt)
        if room <= REACH:
            raise ConfigError.of(
                "data.sequence", sequence, f"more than the {len(prompt)} {'bytes' if reader is None else 'tokens'} of the prompt"
            )
        rows: dict[bytes, list[NDArray[np.int32]]] = {BAD: [], GOOD: []}
        seen = set()
        for text, verdict in self.texts():
            if text[-REPEAT:] in seen:
                continue
            seen.add(text[-REPEAT:])
            last = units(text, reader)[-room:]
            rows[verdict].append(np.concatenate([prompt[:1].repeat(room - len(last)), last, prompt, verdicts[verdict]]))
        whole = torch.from_numpy(np.stack([row for pair in zip(rows[GOOD], rows[BAD], strict=False) for row in pair]))
        splits = cut(whole, TEST_SHARE, "reviews", used == "embedded", train, test, validation)
        return SentimentData(name, self.title, used, splits, sequence, len(prompt), reader)


@dataclass(frozen=True)
class ReviewVerdicts(SentimentSource):
    """The reviews, by the folder that each lies in: pos or neg."""

    path: Path
    title = "movie reviews with their verdicts (Pang and Lee)"

    def key(self) -> str:
        return Reviews(self.path).key()

    def texts(self) -> Iterator[tuple[bytes, bytes]]:
        self.key()  # a damaged archive is named before it is read
        for name, text in Reviews(self.path).documents():
            yield text, GOOD if Path(name).parent.name == "pos" else BAD


class PythonVerdicts(SentimentSource):
    """Some modules of the standard library, each twice: its documentation is good, its code bad."""

    title = "Python's documentation and code to tell apart (embedded stand-in)"

    def key(self) -> str:
        return PythonDocs().key()

    def texts(self) -> Iterator[tuple[bytes, bytes]]:
        for prose, code in _modules():
            yield prose.encode(errors="replace"), GOOD
            yield code.encode(errors="replace"), BAD


@cache
def _modules() -> list[tuple[str, str]]:
    """(documentation, code) of the first modules, in the order of a hash of their names, that have both."""
    files = sorted(PythonDocs().modules(), key=lambda file: hashlib.sha256(file[0].encode()).digest())
    pairs = (("\n\n".join(text for _, text in documents(name, path)), bare(path)) for name, path in files)
    return list(islice((pair for pair in pairs if all(pair)), MODULES))


def find(source: str) -> tuple[str, SentimentSource]:
    """See ``mango.data.find``."""
    path = archive(source, "movie-sentiment")
    return ("embedded", PythonVerdicts()) if path is None else ("local", ReviewVerdicts(path))

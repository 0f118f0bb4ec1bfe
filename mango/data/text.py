"""Text for language models: one memory-mapped file of bytes; windows are counter-based, so that step k is always the same batch."""

from __future__ import annotations

import hashlib
import lzma
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mango.data.base import Progress, cut, derive, identity_of
from mango.data.sources import cache_root, data_root, locked, verify
from mango.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mango.data.tokens import TokenData

VOCABULARY = 256
TEST_SHARE = 20  # the last twentieth of the text is the test split
ARCHIVE = "text/english.txt.xz"
ARCHIVE_SHA256 = "bc68a88c39b35295f824b61488fa3580b16e359218ca3e2a62f0af664b1821d1"


@dataclass(frozen=True)
class TextData:
    """Bytes to predict from the bytes before them.

    Attributes:
        name, title, source: what was asked for, what it truly is (for captions), and "local" or "embedded".
        splits: "train", "test" and, when asked for, "validation": (n,) uint8 each.
        sequence: bytes in a window, which is all the context that a prediction has.
    """

    name: str
    title: str
    source: str
    splits: dict[str, Tensor]
    sequence: int
    unit: str = field(default="bytes", init=False)

    def to(self, device: torch.device) -> TextData:
        splits = {name: split.to(device) for name, split in self.splits.items()}
        return TextData(self.name, self.title, self.source, splits, self.sequence)

    def model_arguments(self) -> dict[str, int]:
        return {"vocabulary": VOCABULARY}

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """``size`` windows that start anywhere in the training text, drawn with replacement.

        Returns: inputs and, one byte later, targets: (size, sequence) int64 each.
        """
        train = self.splits["train"]
        generator = torch.Generator().manual_seed(derive(seed, "windows", step))
        starts = torch.randint(len(train) - self.sequence, (size, 1), generator=generator)
        windows = train[(starts + torch.arange(self.sequence + 1)).to(train.device)].long()  # (size, sequence + 1)
        return windows[:, :-1], windows[:, 1:]

    def evaluation(self, split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The split cut into windows that do not overlap; every byte but the first is predicted once. The last window may be shorter."""
        data = self.splits[split].long()
        inputs, targets = data[:-1], data[1:]
        whole = len(inputs) // self.sequence * self.sequence
        for start in range(0, whole, size * self.sequence):
            part = slice(start, min(start + size * self.sequence, whole))
            yield inputs[part].view(-1, self.sequence), targets[part].view(-1, self.sequence)
        if whole < len(inputs):
            yield inputs[None, whole:], targets[None, whole:]

    def scores(self, split: str, loss: float, accuracy: float) -> dict[str, float]:
        """Bits per byte."""
        return {"bits_per_byte": loss / math.log(2)}

    def files(self) -> dict[str, str]:
        return {}

    def encode(self, text: str) -> Tensor:
        """A text's bytes, (n,) int64."""
        return torch.tensor(list(text.encode()))

    def decode(self, tokens: Tensor) -> str:
        """The text of bytes (n,); those that are no whole character become U+FFFD."""
        return bytes(tokens.tolist()).decode(errors="replace")

    def identity(self) -> dict[str, str | int]:
        return identity_of(self, (hashlib.sha256(split.cpu().numpy().tobytes()).hexdigest() for split in self.splits.values()))


class TextSource(ABC):
    """One text, unpacked into the cache on first use."""

    title: str

    @abstractmethod
    def key(self) -> str: ...

    @abstractmethod
    def parts(self) -> Iterator[bytes]:
        """The text in pieces that fit into memory. Raises: DataError when it is damaged."""

    def load(
        self,
        name: str,
        used: str,
        train: int | None = None,
        test: int | None = None,
        validation: int = 0,
        progress: Progress | None = None,
        sequence: int = 128,
        vocabulary: int | None = None,
        tokenizer: Path | None = None,
    ) -> TextData | TokenData:
        """The splits, which lie in the text in the order train, validation, test.

        Args:
            train, test, validation: bytes of each; None = all: the last twentieth for test, all before it and the validation bytes for
                train. Fewer test bytes are the first of that twentieth, fewer training bytes the last before validation.
            sequence: bytes or tokens in a window.
            vocabulary: tokens of a byte-pair encoding trained on the training split; None = the bytes themselves.
            tokenizer: file of a tokenizer to use in place of one that is trained, as the ``tokenizers`` library saves it.

        Raises: ConfigError when more is asked for than there is, or a split is shorter than a window.
        """
        text = torch.from_numpy(self._mapped())
        splits = cut(text, TEST_SHARE, "bytes", used == "embedded", train, test, validation)
        for split, part in splits.items():
            if len(part) <= sequence:
                raise ConfigError.of(f"data.{split}", len(part), f"more bytes than one window, data.sequence = {sequence}")
        found = TextData(name, self.title, used, splits, sequence)
        if vocabulary is None and tokenizer is None:
            return found
        from mango.data.tokens import tokenized

        return tokenized(found, self._name(), vocabulary, tokenizer)

    def _name(self) -> str:
        return f"{type(self).__name__.lower()}-{self.key()}"

    def _mapped(self) -> np.memmap:
        """The text as (n,) uint8, mapped copy-on-write: never read whole, never written."""
        folder = cache_root() / "text"
        folder.mkdir(parents=True, exist_ok=True)
        name = self._name()
        target = folder / f"{name}.txt"
        if not target.is_file():
            with locked(folder / f"{name}.lock"):
                if not target.is_file():
                    partial = folder / f"{name}.partial"
                    with partial.open("wb") as file:
                        file.writelines(self.parts())
                    os.replace(partial, target)
        return np.memmap(target, np.uint8, "c")


@dataclass(frozen=True)
class English(TextSource):
    """9.3 MB of English, xz-compressed, whose SHA-256 is known: news, presidential addresses, then WikiText-2's held-out splits."""

    path: Path
    title = "English text (news, addresses, WikiText-2)"

    def key(self) -> str:
        return verify(self.path, ARCHIVE_SHA256)[:16]

    def parts(self) -> Iterator[bytes]:
        try:
            yield lzma.decompress(self.path.read_bytes())
        except lzma.LZMAError as error:
            raise DataError(f"{self.path} is not a whole xz file: {error}") from error


def find(source: str) -> tuple[str, TextSource]:
    """See ``mango.data.find``."""
    from mango.data.stdlib import PythonDocs

    if source == "download":
        raise ConfigError.of("data.source", source, f"auto, local or embedded: no public copy of {ARCHIVE} is known")
    root = data_root() if source != "embedded" else None
    if root is not None and (root / ARCHIVE).is_file():
        return "local", English(root / ARCHIVE)
    if source == "local":
        place = f"nothing of it in {root}" if root is not None else "there is no data folder (set MANGO_DATA)"
        raise DataError(f"data.source = 'local' but text was not found: {place}; expected {ARCHIVE}")
    return "embedded", PythonDocs()

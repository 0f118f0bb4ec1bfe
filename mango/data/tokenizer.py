"""Byte-pair encoding by the ``tokenizers`` library: trained on the run's own text, saved with the run, exact both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from mango.compat import require
from mango.errors import ConfigError, DataError

SMALLEST = 257  # 256 bytes and one that starts a document
DOCUMENT = "\0"  # no text holds it: sources put it before each document
# GPT-4's pattern with numbers of at most two digits, as in nanochat: a word with the space before it, a number, or punctuation
PATTERN = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
PIECE = 1 << 18  # bytes that are encoded at a time
TRAINED_ON = 1 << 28  # bytes of the training split that the merges are counted on, at most


class Tokenizer:
    """Text to token numbers and back.

    Args:
        text: what ``tokenizers`` saved (JSON): see ``trained``.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tokenizer: Any = _library().Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower one
            raise DataError(f"the tokenizer is not one that the tokenizers library reads: {error}") from None
        self._by_bytes = "ByteLevel" in json.dumps(json.loads(text).get("decoder"))

    @classmethod
    def trained(cls, split: np.ndarray, vocabulary: int) -> Tokenizer:
        """Merges counted on the beginning of a text; equal texts give equal tokenizers.

        Args:
            split: (n,) uint8, UTF-8.
            vocabulary: tokens, the 256 bytes and the document's start among them. A text with too few pairs gives fewer.

        Raises: ConfigError for a vocabulary below 257; MissingExtra.
        """
        if vocabulary < SMALLEST:
            raise ConfigError.of("data.vocabulary", vocabulary, f"null (bytes) or an integer >= {SMALLEST}")
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        split_words = library.pre_tokenizers.Split(library.Regex(PATTERN), "isolated")
        by_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([split_words, by_bytes])
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[DOCUMENT], initial_alphabet=sorted(by_bytes.alphabet()), show_progress=False
        )
        tokenizer.train_from_iterator((piece.replace(DOCUMENT, "") for piece in pieces(split[:TRAINED_ON])), trainer)
        return cls(tokenizer.to_str())

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def digest(self) -> str:
        """SHA-256 of the whole tokenizer."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def encode(self, split: np.ndarray) -> Iterator[np.ndarray]:
        """Tokens of a UTF-8 text, (n,) int32 for each piece of it; joined and decoded they are the text."""
        for piece in pieces(split):
            yield np.asarray(self._tokenizer.encode(piece, add_special_tokens=False).ids, dtype=np.int32)

    def nbytes(self, token: int) -> int:
        """Bytes of text that a token stands for: each character of its name is one, in a byte-level vocabulary."""
        return len(self._tokenizer.id_to_token(token)) if self._by_bytes else len(self.decode([token]).encode())

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens; bytes that are no whole character become U+FFFD."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


def whole_characters(split: np.ndarray) -> np.ndarray:
    """A cut of UTF-8 text (uint8) without the parts of characters at its ends."""
    first = next((place for place in range(min(4, len(split))) if split[place] & 0xC0 != 0x80), len(split) if len(split) < 4 else 0)
    return split[first : _whole(split)]


def _whole(split: np.ndarray) -> int:
    """Bytes up to the last whole character."""
    starts = [place for place in range(max(0, len(split) - 4), len(split)) if split[place] & 0xC0 != 0x80]
    if not starts:
        return len(split)
    lead = int(split[starts[-1]])
    length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    return len(split) if starts[-1] + length <= len(split) else starts[-1]


def pieces(split: np.ndarray) -> Iterator[str]:
    """The text in pieces that end after a line, or after a whole character where a line is too long.

    Raises: DataError when it is not UTF-8.
    """
    start = 0
    while start < len(split):
        chunk = split[start : start + PIECE]
        if start + PIECE < len(split):
            lines = np.flatnonzero(chunk == ord("\n"))
            chunk = chunk[: lines[-1] + 1 if len(lines) else _whole(chunk)]
        try:
            yield bytes(chunk).decode()
        except UnicodeDecodeError as error:
            raise DataError(f"the text is not UTF-8 near byte {start + error.start}: {error.reason}; bytes need no tokenizer") from None
        start += len(chunk)


def _library() -> Any:
    return require("tokenizers", extra="experiments", purpose="a vocabulary of more than bytes")

"""Tokens: the tokenizer is exact and the same every time, epochs hold every window once, bits per byte count bytes; parquet shards."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mango import data
from mango.data import tokenizer
from mango.data.tokenizer import Tokenizer, pieces, whole_characters
from mango.data.tokens import TokenData
from mango.errors import ConfigError, DataError

PROSE = (
    "It is a truth universally acknowledged, that a single man in possession of 1000 pounds must be in want of a wife.\n"
    "Wie schön, daß wir uns treffen - naïve façades, “quotes”, 東京 and 🎉🎉!\r\n\n   Indented   lines\tand tabs.\n"
) * 12


def as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _isolated(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANGO_CACHE", str(cache))
    monkeypatch.setenv("MANGO_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.trained(as_bytes(PROSE), 300)


def joined(trained: Tokenizer, text: str) -> list[int]:
    return np.concatenate([np.zeros(0, np.int32), *trained.encode(as_bytes(text))]).tolist()


# the tokenizer


def test_the_same_text_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    again = Tokenizer.trained(as_bytes(PROSE), 300)
    assert again.text == trained.text and again.digest == trained.digest and len(trained) == 300
    assert Tokenizer.trained(as_bytes(PROSE[:-7]), 300).digest != trained.digest
    assert joined(Tokenizer(trained.text), PROSE) == joined(trained, PROSE)


@given(text=st.text(max_size=200))
def test_decoding_gives_back_every_text_and_tokens_say_their_bytes(trained: Tokenizer, text: str) -> None:
    tokens = joined(trained, text)
    assert trained.decode(tokens) == text
    assert sum(map(trained.nbytes, tokens)) == len(text.encode())
    assert all(0 <= token < len(trained) for token in tokens)


def test_it_compresses_what_it_was_trained_on(trained: Tokenizer) -> None:
    assert len(joined(trained, PROSE)) < 0.8 * len(PROSE.encode())


def test_a_document_starts_with_a_token_of_its_own(trained: Tokenizer) -> None:
    tokens = joined(trained, "\0one\0two")
    (start,) = joined(trained, "\0")
    assert tokens.count(start) == 2 and tokens[0] == start
    assert trained.decode(tokens) == "\0one\0two"


@given(cut=st.integers(0, 60), end=st.integers(0, 60))
def test_a_cut_loses_only_parts_of_characters(cut: int, end: int) -> None:
    text = as_bytes("añ東🎉" * 8)
    part = text[cut : max(cut, len(text) - end)]
    found = whole_characters(part)
    assert bytes(found).decode() in "añ東🎉" * 8
    assert len(part) - len(found) <= 6
    assert bytes(found).decode() == bytes(part).decode(errors="ignore")


def test_pieces_are_the_text_and_end_after_lines_or_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PIECE", 32)
    text = PROSE[:300] + "東" * 40
    found = list(pieces(as_bytes(text)))
    assert "".join(found) == text and len(found) > 5
    assert all(len(piece.encode()) <= 32 for piece in found)
    with pytest.raises(DataError, match="the text is not UTF-8 near byte 33: invalid start byte"):
        list(pieces(np.concatenate([as_bytes("a" * 33), np.array([255], np.uint8), as_bytes("a" * 40)])))


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.vocabulary = 200 is not legal: null \(bytes\) or an integer >= 257"):
        data.load("text", vocabulary=200)


# batches and scores


def counting(size: int, sequence: int, trained: Tokenizer) -> TokenData:
    """Tokens that count up, so that a window shows where it came from."""
    part = torch.arange(size, dtype=torch.int32)
    return TokenData("text", "counting", "local", {"train": part, "test": part}, {"train": 3 * size, "test": 2 * size}, trained, sequence)


@given(sequence=st.integers(1, 9), size=st.integers(20, 90), batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_an_epoch_holds_every_window_once(trained: Tokenizer, sequence: int, size: int, batch: int, seed: int) -> None:
    loaded = counting(size, sequence, trained)
    count = (size - 1) // sequence
    steps = math.ceil(2 * count / batch)
    windows = torch.cat([loaded.batch(step, batch, seed)[0] for step in range(steps)])[: 2 * count]
    for epoch in windows.split(count):
        starts = epoch[:, 0].sort().values
        assert torch.equal(starts.diff(), torch.full((count - 1,), sequence)), "no token twice, none left out between"
        assert starts[0] >= 0 and starts[-1] + sequence < size
    inputs, targets = loaded.batch(1, batch, seed)
    assert torch.equal(inputs + 1, targets) and torch.equal(loaded.batch(1, batch, seed)[0], inputs), "a function of the step alone"


def test_orders_differ_between_epochs_and_seeds(trained: Tokenizer) -> None:
    loaded = counting(401, 4, trained)
    first, second, other = (loaded.batch(step, 100, seed)[0] for step, seed in ((0, 0), (1, 0), (0, 1)))
    assert not torch.equal(first, second) and not torch.equal(first, other)


def test_bits_per_byte_are_what_all_tokens_cost_over_the_bytes_they_stand_for() -> None:
    loaded = data.load("text", source="embedded", train=60_000, test=3000, vocabulary=400, sequence=16)
    assert isinstance(loaded, TokenData) and loaded.model_arguments() == {"vocabulary": 400} and loaded.unit == "tokens"
    predicted = torch.cat([targets.flatten() for _, targets in loaded.evaluation("test", 7)])
    assert len(predicted) == len(loaded.splits["test"]) - 1
    spelled = sum(loaded.tokenizer.nbytes(token) for token in predicted.tolist())
    uniform = len(predicted) * math.log2(400) / spelled
    assert loaded.scores("test", math.log(400), 0.0) == {"bits_per_byte": pytest.approx(uniform)}
    assert loaded.scores("train", 1.0, 0.0) != loaded.scores("test", 1.0, 0.0)
    text = data.load("text", source="embedded", train=60_000, test=3000, sequence=16)
    assert (
        loaded.decode(loaded.splits["test"]) == text.decode(text.splits["test"]) and loaded.decode(loaded.encode("a façade")) == "a façade"
    )


def test_tokens_are_made_once_and_named_by_text_and_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"source": "embedded", "train": 30_000, "test": 2000, "sequence": 16}
    first = data.load("text", vocabulary=300, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "trained", lambda *_: pytest.fail("it is in the cache"))
        patch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("they are in the cache"))
        again = data.load("text", vocabulary=300, **options)
    assert again.identity() == first.identity() and again.files() == first.files()
    assert data.load("text", vocabulary=301, **options).identity()["fingerprint"] != first.identity()["fingerprint"]
    with pytest.raises(ConfigError, match=r"data\.test = 2000 is not legal: bytes that make more tokens than a window"):
        data.load("text", vocabulary=300, **(options | {"sequence": 1500}))


# shards


def shard(path: Path, documents: list[str | None], column: str = "text") -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: documents, "score": [1.0] * len(documents)}), path, row_group_size=2)


def test_shards_are_read_in_order_document_by_document(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "fineweb-edu"
    shard(folder / "b.parquet", ["third " * 90])
    shard(folder / "a" / "x.parquet", ["first " * 90, None, "", "sec\0ond " * 90])
    loaded = data.load("fineweb-edu", sequence=8)
    assert (loaded.source, loaded.title) == ("local", "FineWeb-Edu (parquet shards)")
    text = "".join(loaded.decode(loaded.splits[name]) for name in ("train", "test"))
    assert text == "\0" + "first " * 90 + "\0" + "second " * 90 + "\0" + "third " * 90
    tokens = data.load("fineweb-edu", sequence=8, vocabulary=280)
    assert tokens.splits["train"].tolist().count(tokens.encode("\0").item()) == 3
    before = data.find("fineweb-edu", "auto")[1].key()
    shard(folder / "c.parquet", ["fourth " * 90])
    assert data.find("fineweb-edu", "auto")[1].key() != before


def test_what_is_no_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fineweb-edu was not found: nothing of it in .*; expected fineweb-edu/\*\.parquet"):
        data.find("fineweb-edu", "local")
    with pytest.raises(ConfigError, match=r"data\.source = 'download' is not legal"):
        data.find("fineweb-edu", "download")
    assert data.find("fineweb-edu", "auto")[0] == "embedded"
    path = tmp_path / "data" / "fineweb-edu" / "a.parquet"
    shard(path, ["x"], column="content")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text': its columns are content, score"):
        data.load("fineweb-edu")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file"):
        data.load("fineweb-edu")

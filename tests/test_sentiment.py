"""Verdicts on reviews: splits that share nothing, windows that end in the prompt, labels that are the archive's."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mango import data
from mango.data import reviews, sentiment, sources
from mango.data.tokenizer import Tokenizer
from mango.errors import ConfigError, DataError

REAL = sources.data_root()  # before the tests hide it


pytestmark = pytest.mark.usefixtures("own_folders")


ARCHIVE = (REAL or Path("nowhere")) / reviews.ARCHIVE
with_reviews = pytest.mark.skipif(not ARCHIVE.is_file(), reason="needs the archive of reviews, which is never committed")


@pytest.fixture(params=[pytest.param("local", marks=with_reviews), "embedded"])
def verdicts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., sentiment.SentimentData]:
    """Loads the reviews, and their stand-in."""
    if request.param == "local":
        monkeypatch.setenv("MANGO_DATA", str(ARCHIVE.parents[1]))
    return lambda **options: data.load("movie-sentiment", request.param, **options)  # type: ignore[return-value]


def rows(loaded: sentiment.SentimentData, split: str) -> list[tuple[bytes, bytes]]:
    """(the end of the review without padding, verdict)"""
    whole = [bytes(row.tolist()) for row in loaded.splits[split]]
    assert all(row[-len(sentiment.PROMPT) - 1 : -1] == sentiment.PROMPT for row in whole)
    return [(row[: -len(sentiment.PROMPT) - 1].lstrip(b"\n"), row[-1:]) for row in whole]


def test_splits_of_verdicts_share_no_review_and_hold_both_kinds_alike(verdicts: Callable[..., sentiment.SentimentData]) -> None:
    loaded = verdicts(validation=21, sequence=64)
    assert ("stand-in" in loaded.title) == (loaded.source == "embedded") and loaded.unit == "reviews"
    ends: set[bytes] = set()
    for split in ("train", "validation", "test"):
        kinds = [kind for _, kind in rows(loaded, split)]
        assert set(kinds) == {sentiment.GOOD, sentiment.BAD} and abs(kinds.count(sentiment.GOOD) - kinds.count(sentiment.BAD)) <= 1
        these = {end for end, _ in rows(loaded, split)}
        assert not ends & these
        ends |= these
    total = sum(map(len, loaded.splits.values()))
    assert len(loaded.splits["test"]) == total // 5
    found = loaded.identity()
    assert found["majority"] == 0.5 and found["train"] + found["validation"] + found["test"] == total
    part = verdicts(train=8, test=4, sequence=64)
    assert torch.equal(part.splits["test"], loaded.splits["test"][:4])
    assert torch.equal(part.splits["train"], torch.cat([loaded.splits["train"], loaded.splits["validation"]])[-8:])


def test_windows_end_in_the_prompt_and_depend_on_step_and_seed_alone(verdicts: Callable[..., sentiment.SentimentData]) -> None:
    loaded = verdicts(sequence=64)
    inputs, targets = loaded.batch(5, 16, seed=1)
    assert inputs.shape == (16, 64) and targets.shape == (16, 1) and inputs.dtype == targets.dtype == torch.int64
    known = rows(loaded, "train")
    for window, target in zip(inputs, targets, strict=True):
        body, kind = bytes(window.tolist()).removesuffix(sentiment.PROMPT), bytes(target.tolist())
        assert len(body) == 64 - len(sentiment.PROMPT)
        assert any(body.lstrip(b"\n") in end and kind == verdict for end, verdict in known)
    again = verdicts(sequence=64).batch(5, 16, seed=1)
    assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)
    for other in (loaded.batch(6, 16, seed=1), loaded.batch(5, 16, seed=2)):
        assert not torch.equal(other[0], inputs)


def test_evaluation_asks_once_for_every_review_after_its_end(verdicts: Callable[..., sentiment.SentimentData]) -> None:
    loaded = verdicts(sequence=64)
    parts = list(loaded.evaluation("test", 7))
    assert {len(inputs) for inputs, _ in parts[:-1]} == {7}
    inputs, targets = (torch.cat(each) for each in zip(*parts, strict=True))
    known = rows(loaded, "test")
    assert len(inputs) == len(known)
    for window, target, (end, kind) in zip(inputs, targets, known, strict=True):
        body = bytes(window.tolist()).removesuffix(sentiment.PROMPT)
        assert (body.lstrip(b"\n"), bytes(target.tolist())) == (end[-len(body) :].lstrip(b"\n"), kind)
    assert loaded.scores("test", 0.7, 0.6) == {"accuracy": 0.6}


@with_reviews
def test_verdicts_are_the_archives_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANGO_DATA", str(ARCHIVE.parents[1]))
    loaded = data.load("movie-sentiment", "local", sequence=64)
    assert isinstance(loaded, sentiment.SentimentData)
    width = sentiment.REACH + 64 - len(sentiment.PROMPT)
    whole = io.BytesIO(lzma.decompress(ARCHIVE.read_bytes()))
    kinds: dict[bytes, str] = {}
    by_folder: dict[str, list[tuple[bytes, bytes]]] = {"pos": [], "neg": []}
    with tarfile.open(fileobj=whole) as archive:
        for member in archive.getmembers():
            folder = member.name.split("/")[-2] if member.name.endswith(".txt") else ""
            if folder in by_folder:
                file = archive.extractfile(member)
                assert file is not None
                end = file.read().decode(errors="replace").strip().encode()[-width:].lstrip(b"\n")
                kinds[end] = folder
                by_folder[folder].append((hashlib.sha256(member.name.encode()).digest(), end))
    assert [len(found) for found in by_folder.values()] == [1000, 1000] and len(kinds) == 1994, "six were posted twice"
    for split in ("train", "test"):
        assert all(kinds[end] == {sentiment.GOOD: "pos", sentiment.BAD: "neg"}[kind] for end, kind in rows(loaded, split))
    once = [list(dict.fromkeys(end for _, end in sorted(found)))[:996] for found in by_folder.values()]  # repeats are of one folder
    assert {end for end, _ in rows(loaded, "test")} == {end for ends in once for end in ends[-199:]}


class Few(sentiment.SentimentSource):
    """Reviews of a test's own."""

    title = "few"

    def __init__(self, *texts: bytes) -> None:
        self.given = texts

    def key(self) -> str:
        return "few"

    def texts(self) -> Iterator[tuple[bytes, bytes]]:
        return ((text + kind, kind) for text in self.given for kind in (sentiment.GOOD, sentiment.BAD))


def test_short_reviews_are_padded_with_newlines_and_windows_begin_inside_longer_ones() -> None:
    room = 10
    texts = [b"%d review of thirty bytes, no mo" % number for number in range(9)]
    loaded = Few(b"abc", *texts).load("movie-sentiment", "local", sequence=room + len(sentiment.PROMPT))
    seen = set()
    for step in range(100):
        for window in loaded.batch(step, 16, seed=0)[0]:
            seen.add(bytes(window.tolist())[:room])
    padded = {body for body in seen if body.startswith(b"\n")}
    assert padded == {b"\n" * 6 + b"abc" + kind for kind in (sentiment.GOOD, sentiment.BAD)}
    # 31 bytes and the kind: 23 places for a window, of which the first holds the number, the last the kind
    middle = {bytes(" review of thirty bytes, no mo"[start : start + room], "ascii") for start in range(21)}
    assert middle <= seen and len(seen - padded - middle) == 7 + 2, "every place in the longer reviews, and no other"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": 17}, r"data\.train \+ data\.validation = 17 is not legal: at most the 16 reviews before the test split"),
        ({"validation": 16}, r"data\.train \+ data\.validation = 16 is not legal"),
        ({"test": 5}, r"data\.test = 5 is not legal: at most the 4 reviews of the test split"),
        ({"sequence": len(sentiment.PROMPT)}, r"data\.sequence = 10 is not legal: more than the 10 bytes of the prompt"),
    ],
)
def test_bad_requests_for_verdicts_are_named(options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Few(*[b"review %d" % number for number in range(10)]).load("movie-sentiment", "local", **options)  # type: ignore[arg-type]


def test_verdicts_without_an_archive_are_refused_or_a_stand_in() -> None:
    assert data.find("movie-sentiment", "auto")[0] == "embedded"
    with pytest.raises(DataError, match="movie-sentiment was not found"):
        data.load("movie-sentiment", "local")
    with pytest.raises(ConfigError, match=r"by hand"):
        data.load("movie-sentiment", "download")


def test_verdicts_are_read_by_a_checkpoints_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.models import WordLevel

    words = np.frombuffer(b"a review of thirty bytes, no more. " * 40, np.uint8)
    file = tmp_path / "tokenizer.json"
    file.write_text(Tokenizer.trained(words, 280).text)
    loaded = Few(*[bytes(words[:300]) + b"%d" % number for number in range(5)]).load(
        "movie-sentiment", "local", sequence=20, tokenizer=file
    )
    inputs, targets = next(loaded.evaluation("train", 4))
    assert inputs.shape == (4, 20) and loaded.decode(inputs[0]).endswith(sentiment.PROMPT.decode())
    assert len(loaded.decode(inputs[0])) > 20, "tokens hold more than a byte"
    assert [loaded.decode(target) for target in targets] == ["y", "n", "y", "n"]
    assert loaded.model_arguments() == {"vocabulary": len(Tokenizer(file.read_text()))}
    assert loaded.files() == {"tokenizer.json": file.read_text()}
    unknown = Library(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    file.write_text(unknown.to_str())
    with pytest.raises(ConfigError, match=r"different tokens for n and y"):
        Few(b"a review").load("movie-sentiment", "local", tokenizer=file)

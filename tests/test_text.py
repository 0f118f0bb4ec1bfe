"""Text: where it is found, that damage is named, how windows are drawn and evaluated."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mango import data
from mango.data import sources, stdlib, text
from mango.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("own_folders")


# text


def make_text(root: Path, monkeypatch: pytest.MonkeyPatch, size: int = 4000) -> bytes:
    """A local text of ``size`` bytes, whose checksum is taken for the right one."""
    content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    (root / "text").mkdir()
    (root / text.ARCHIVE).write_bytes(lzma.compress(content))
    monkeypatch.setattr(text, "ARCHIVE_SHA256", sources.sha256(root / text.ARCHIVE))
    return content


def test_a_local_text_is_checked_unpacked_once_and_split_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = make_text(tmp_path / "data", monkeypatch)
    whole = data.load("text", sequence=16)
    assert (whole.source, whole.title) == ("local", "English text (news, addresses, WikiText-2)")
    assert {name: bytes(split.tolist()) for name, split in whole.splits.items()} == {"train": content[:3800], "test": content[3800:]}
    part = data.load("text", train=500, test=50, validation=100, sequence=16)
    cut = {"train": content[3200:3700], "validation": content[3700:3800], "test": content[3800:3850]}
    assert {name: bytes(split.tolist()) for name, split in part.splits.items()} == cut
    assert part.identity() | {"fingerprint": ""} == {
        "name": "text",
        "source": "local",
        "title": whole.title,
        "fingerprint": "",
        "train": 500,
        "test": 50,
        "validation": 100,
    }
    assert len({data.load("text", train=size, sequence=16).identity()["fingerprint"] for size in (500, 501, 500)}) == 2
    monkeypatch.setattr(text.English, "parts", lambda self: pytest.fail("it is in the cache"))
    data.load("text", sequence=16)
    (unpacked,) = (tmp_path / "cache" / "text").glob("*.txt")
    part.splits["train"].zero_()
    assert unpacked.read_bytes() == content, "the cache is never written through the map"


def test_a_damaged_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_text(tmp_path / "data", monkeypatch)
    path = tmp_path / "data" / text.ARCHIVE
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"english\.txt\.xz is damaged or another version"):
        data.load("text")
    monkeypatch.setattr(text, "ARCHIVE_SHA256", sources.sha256(path))
    with pytest.raises(DataError, match=r"english\.txt\.xz is not a whole xz file"):
        data.load("text")
    assert not list((tmp_path / "cache").rglob("*.txt"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": 3900}, r"data\.train \+ data\.validation = 3900 is not legal: at most the 3800"),
        ({"train": 3800, "validation": 1}, "3801 is not legal"),
        ({"test": 201}, r"data\.test = 201 is not legal: at most the 200"),
        ({"test": 64, "sequence": 64}, r"data\.test = 64 is not legal: more bytes than one window, data\.sequence = 64"),
        ({"validation": 10, "sequence": 16}, r"data\.validation = 10 is not legal"),
    ],
)
def test_bad_requests_for_text_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int], words: str) -> None:
    make_text(tmp_path / "data", monkeypatch)
    with pytest.raises(ConfigError, match=words):
        data.load("text", **options)  # type: ignore[arg-type]


def corpus(size: int, sequence: int) -> text.TextData:
    """Bytes that count up, so that a window shows where it came from."""
    part = (torch.arange(size) % 251).to(torch.uint8)
    return text.TextData("text", "counting", "local", {"train": part, "test": part}, sequence)


def test_windows_are_runs_of_the_text_and_depend_on_step_and_seed_alone() -> None:
    counting = corpus(1000, 32)
    inputs, targets = counting.batch(5, 64, seed=1)
    assert inputs.shape == targets.shape == (64, 32) and inputs.dtype == torch.int64
    assert torch.equal((inputs + 1) % 251, targets)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(counting.batch(5, 64, seed=1)[0], inputs)
    for other in (counting.batch(6, 64, seed=1), counting.batch(5, 64, seed=2)):
        assert not torch.equal(other[0], inputs)


def test_windows_start_everywhere_alike() -> None:
    starts = torch.cat([corpus(40, 30).batch(step, 1000, seed=0)[0][:, 0] for step in range(20)])
    counts = starts.bincount().float()  # 10 places: a window takes 31 of the 40 bytes
    assert len(counts) == 10
    assert ((counts - 2000).abs() < 5 * (20_000 * 0.1 * 0.9) ** 0.5).all()


@given(size=st.integers(10, 200), sequence=st.integers(1, 9), batch=st.integers(1, 7))
def test_evaluation_predicts_every_byte_but_the_first_once(size: int, sequence: int, batch: int) -> None:
    counting = corpus(size, sequence)
    seen = []
    for inputs, targets in counting.evaluation("test", batch):
        assert inputs.shape == targets.shape and inputs.shape[0] <= batch and inputs.shape[1] <= sequence
        assert torch.equal((inputs + 1) % 251, targets)
        seen += targets.flatten().tolist()
    assert seen == [(byte + 1) % 251 for byte in range(size - 1)]


def test_the_task_metric_of_text_is_bits_per_byte_and_of_images_accuracy() -> None:
    assert corpus(10, 2).scores("test", np.log(256), 0.3) == {"bits_per_byte": pytest.approx(8.0)}
    assert data.load("digits", train=100, test=50).scores("test", 1.0, 0.3) == {"accuracy": 0.3}


def test_the_embedded_text_is_pythons_documentation_in_english(tmp_path: Path) -> None:
    loaded = data.load("text", test=50_000, validation=50_000, sequence=64)
    assert (loaded.source, loaded.title) == ("embedded", "Python's documentation (embedded stand-in)")
    assert len(loaded.splits["train"]) > 500_000
    words = bytes(loaded.splits["train"].tolist()).decode().split()
    assert sum(word in ("the", "a", "of", "is", "to", "and") for word in words) > 0.1 * len(words), "prose, not code"
    again = stdlib.PythonDocs()
    assert next((tmp_path / "cache" / "text").glob("pythondocs-*.txt")).stem == f"pythondocs-{again.key()}"

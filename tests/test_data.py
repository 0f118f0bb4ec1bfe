"""Data: where it is found, that damage is named, that subsets and batches are what they claim, always the same."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from mango import data
from mango.data import cifar10, images, sources
from mango.data.decode import decode_image
from mango.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("cat", "dog", "ship")


pytestmark = pytest.mark.usefixtures("own_folders")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def make_folders(root: Path, per_class: int = 6, suffix: str = "png") -> None:
    for split, offset in (("train", 0), ("test", 1000)):
        for label, name in enumerate(CLASSES):
            folder = root / "cifar10" / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                Image.fromarray(picture(offset + 100 * label + number)).save(folder / f"{number:04d}.{suffix}")


def make_batches(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for position, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        pixels = np.stack([picture(10 * position + number) for number in range(4)])
        flat = pixels.transpose(0, 3, 1, 2).reshape(4, 3072)
        (folder / name).write_bytes(pickle.dumps({b"data": flat, b"labels": [0, 3, 3, 9], b"filenames": [b"x"] * 4}))


# where it is found


def test_class_folders_are_read_pixel_for_pixel(tmp_path: Path) -> None:
    make_folders(tmp_path / "data")
    loaded = data.load("cifar10", source="local")
    assert (loaded.source, loaded.title, loaded.classes) == ("local", "CIFAR-10", list(CLASSES))
    train = loaded.splits["train"]
    assert train.images.shape == (18, 32, 32, 3)
    assert train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert np.array_equal(train.images[7].numpy(), picture(101))
    assert np.array_equal(loaded.splits["test"].images[0].numpy(), picture(1000))


def test_pickled_batches_are_read_pixel_for_pixel(tmp_path: Path) -> None:
    make_batches(tmp_path / "data")
    loaded = data.load("cifar10")
    assert loaded.source == "local"
    assert len(loaded.splits["train"]) == 20
    assert loaded.classes == ["airplane", "cat", "truck"]
    assert {image.tobytes() for image in loaded.splits["test"].images.numpy()} == {picture(50 + number).tobytes() for number in range(4)}


def test_the_archive_is_read_when_its_checksum_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(tmp_path)
    archive = tmp_path / "data" / cifar10.ARCHIVE
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tmp_path / "cifar10", "cifar10")
    with pytest.raises(DataError) as error:
        data.load("cifar10")
    assert str(archive) in str(error.value)
    assert cifar10.ARCHIVE_SHA256 in str(error.value)
    assert sources.sha256(archive) in str(error.value)
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", sources.sha256(archive))
    from_archive = data.load("cifar10")
    assert from_archive.title == "CIFAR-10 (JPEG)"
    (tmp_path / "cifar10").rename(tmp_path / "data" / "cifar10")
    from_folders = data.load("cifar10")
    assert from_folders.identity()["fingerprint"] == from_archive.identity()["fingerprint"]


def test_auto_without_data_is_embedded_and_says_so_while_local_is_an_error() -> None:
    loaded = data.load("cifar10", train=8000, test=2000)
    assert (loaded.source, loaded.title) == ("embedded", "digits (embedded stand-in)")
    assert len(loaded.splits["train"]) + len(loaded.splits["test"]) == 1797
    assert not loaded.flip
    with pytest.raises(DataError, match=r"data\.source = 'local' but cifar10 was not found.*expected cifar10/"):
        data.load("cifar10", source="local")


def test_a_data_folder_that_is_none_is_an_error_and_not_a_silent_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANGO_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"MANGO_DATA = .*nowhere' is not a folder"):
        data.load("cifar10")
    monkeypatch.setenv("MANGO_DATA", "")
    assert data.find("cifar10", "auto")[0] == "embedded"


def test_nothing_but_download_opens_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    data.load("cifar10", train=100, test=50)
    with pytest.raises(DataError, match="download of CIFAR-10 failed"):
        data.load("cifar10", source="download")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "cifar11"}, r"data\.name = 'cifar11' is not legal: one of c4, cifar10, digits"),
        ({"name": "cifar10", "source": "web"}, r"data\.source = 'web' is not legal: one of auto, local, download, embedded"),
        ({"name": "digits", "source": "local"}, "digits ship with scikit-learn"),
        ({"name": "digits", "train": 5000}, r"5000 is not legal: at most the \d+ training images"),
        ({"name": "digits", "test": 5000}, r"data\.test = 5000 is not legal: at most the \d+ test images"),
        ({"name": "digits", "train": 1400, "validation": 100}, "1500 is not legal"),
        ({"name": "text", "source": "download"}, "no public copy"),
    ],
)
def test_bad_requests_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        data.load(**options)  # type: ignore[arg-type]


# damage


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("cut", [1, 20, 400, None])
def test_a_truncated_image_is_named_and_leaves_no_cache(tmp_path: Path, suffix: str, cut: int | None) -> None:
    make_folders(tmp_path / "data", per_class=2, suffix=suffix)
    victim = tmp_path / "data" / "cifar10" / "train" / "dog" / f"0001.{suffix}"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-cut] if cut else b"")
    with pytest.raises(DataError, match="is not a whole image") as error:
        data.load("cifar10")
    assert str(victim) in str(error.value)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    victim.write_bytes(whole)
    assert len(data.load("cifar10").splits["train"]) == 6


def test_an_image_that_is_damaged_after_it_was_cached_is_noticed(tmp_path: Path) -> None:
    make_folders(tmp_path / "data", per_class=2)
    data.load("cifar10")
    victim = tmp_path / "data" / "cifar10" / "test" / "cat" / "0000.png"
    victim.write_bytes(victim.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"0000\.png is not a whole image"):
        data.load("cifar10")


def test_text_that_poses_as_an_image_is_named() -> None:
    with pytest.raises(OSError, match="cannot identify"):
        decode_image(b"not an image at all", 32)


@pytest.mark.parametrize("damage", ["cut", "missing", "code"])
def test_damaged_batches_are_named(tmp_path: Path, damage: str) -> None:
    make_batches(tmp_path / "data")
    victim = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-1000])
    elif damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(pickle.dumps(os.getcwd))  # a pickle that would run code
    with pytest.raises(DataError, match="data_batch_3 is"):
        data.load("cifar10")


def test_a_missing_or_empty_split_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "cifar10"
    (folder / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"cifar10/train holds no images: expected cifar10/\{train,test\}"):
        data.load("cifar10")
    Image.new("RGB", (32, 32)).save(folder / "train" / "cat" / "0.png")
    with pytest.raises(DataError, match="cifar10/test is missing: expected"):
        data.load("cifar10")
    (folder / "test").mkdir()
    with pytest.raises(DataError, match="cifar10/test holds no images"):
        data.load("cifar10")


# the cache

BUILD = """
import os, signal, sys
from mango.data import decode
count = 0
def slow(data, size, decode_image=decode.decode_image):
    global count
    count += 1
    if sys.argv[1] == "kill" and count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_image(data, size)
decode.decode_image = slow
from mango import data
print(data.load("cifar10").identity()["fingerprint"], count)
"""


def build(mode: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(BUILD), mode], stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_build_leaves_no_half_cache_and_two_processes_build_once(tmp_path: Path) -> None:
    make_folders(tmp_path / "data")
    killed = build("kill")
    assert killed.wait(timeout=120) == -signal.SIGKILL
    assert not list((tmp_path / "cache").rglob("meta.json"))
    both = [build("run"), build("run")]
    results = [process.communicate(timeout=120)[0].split() for process in both]
    assert results[0][0] == results[1][0]
    assert sorted(int(decoded) for _, decoded in results) == [0, 36], "one decodes, the other waits and reads"
    assert len(list((tmp_path / "cache").rglob("meta.json"))) == 1
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_two_processes_decode_many_images_in_order(tmp_path: Path) -> None:
    make_folders(tmp_path / "data", per_class=100)  # 600 images: three chunks
    seen: list[int] = []
    loaded = data.load("cifar10", progress=seen.append)
    assert seen[-1] == 600
    assert np.array_equal(loaded.splits["train"].images[250].numpy(), picture(250))
    victim = tmp_path / "data" / "cifar10" / "test" / "dog" / "0050.png"
    victim.write_bytes(b"")
    with pytest.raises(DataError, match=r"0050\.png is not a whole image"):
        data.load("cifar10")


def test_images_of_other_sizes_and_modes_become_rgb_of_the_asked_size() -> None:
    for mode in ("L", "RGBA", "P"):
        file = io.BytesIO()
        Image.new(mode, (50, 40), 7).save(file, "PNG")
        assert decode_image(file.getvalue(), 32).shape == (32, 32, 3)


# subsets


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_every_prefix_of_the_order_is_as_balanced_as_the_classes_allow(labels: list[int], choose: st.DataObject) -> None:
    array = np.array(labels, np.int64)
    order = images.balanced_order(array)
    assert sorted(order) == list(range(len(labels)))
    size = choose.draw(st.integers(1, len(labels)))
    counts = np.bincount(array[order[:size]], minlength=5)
    total = np.bincount(array, minlength=5)
    for label in range(5):
        for other in range(5):
            if counts[label] < total[label]:  # a class that has images left is at most one behind any other
                assert counts[label] >= counts[other] - 1


def test_subsets_are_fixed_balanced_and_disjoint() -> None:
    one = data.load("digits", train=300, test=100, validation=100)
    two = data.load("digits", train=300, test=100, validation=100)
    assert one.identity() == two.identity()
    assert one.identity()["fingerprint"] != data.load("digits", train=290, test=100, validation=100).identity()["fingerprint"]
    assert one.splits["train"].labels.bincount().tolist() == [30] * 10
    assert one.splits["validation"].labels.bincount().tolist() == [10] * 10
    train, validation, test = ({image.tobytes() for image in one.splits[name].images.numpy()} for name in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test


def test_normalisation_gives_the_training_subset_mean_0_and_deviation_1() -> None:
    loaded = data.load("digits", train=200, test=100)
    normal = loaded._normalised(loaded.splits["train"].images)
    assert normal.shape == (200, 3, 32, 32)
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(normal.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    first = loaded.splits["train"].images[0, :, :, 0]
    assert torch.equal(first, first[::4, ::4].repeat_interleave(4, 0).repeat_interleave(4, 1)), "each pixel is a block of 4x4"


# batches


def test_an_epoch_holds_every_image_once_and_step_k_is_always_the_same_batch() -> None:
    plain = data.load("digits", train=100, test=50, augment=False)
    epoch = torch.cat([plain.batch(step, 25, seed=3)[0] for step in range(4)])
    assert len(epoch.flatten(1).unique(dim=0)) == len(plain._normalised(plain.splits["train"].images).flatten(1).unique(dim=0))
    loaded = data.load("digits", train=100, test=50)
    again = loaded.batch(2, 25, seed=3)
    assert torch.equal(loaded.batch(2, 25, seed=3)[0], again[0])
    assert not torch.equal(plain.batch(2, 25, seed=3)[0], again[0]), "cropped at random"
    assert not torch.equal(loaded.batch(6, 25, seed=3)[0], again[0]), "another epoch, another order"
    assert not torch.equal(loaded.batch(2, 25, seed=4)[0], again[0])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**62), flip=st.booleans())
def test_augmentation_is_a_crop_of_the_reflected_image_or_its_mirror(seed: int, flip: bool) -> None:
    pictures = torch.from_numpy(np.stack([picture(number) for number in range(3)]))
    split = images.Split(pictures, torch.arange(3))
    loaded = images.ImageData("x", "x", "local", {"train": split}, ["a", "b", "c"], flip, torch.zeros(3), torch.ones(3))
    chosen = torch.tensor([2, 0])
    found = loaded._augmented(pictures, chosen, seed)
    padded = functional.pad(pictures.permute(0, 3, 1, 2).float(), (images.PAD,) * 4, mode="reflect").byte()  # (3, 3, 40, 40)
    for image, source in zip(found, padded[chosen], strict=True):
        crops = [source[:, y : y + 32, x : x + 32].permute(1, 2, 0) for y in range(9) for x in range(9)]
        crops += [crop.flip(1) for crop in crops] if flip else []
        assert any(torch.equal(image, crop) for crop in crops)


def test_crops_and_mirrors_are_uniform() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(1, 32, 32, 3).contiguous()
    loaded = images.ImageData("x", "x", "local", {"train": images.Split(ramp, torch.zeros(1))}, ["a"], True, torch.zeros(3), torch.ones(3))
    found = loaded._augmented(ramp, torch.zeros(20_000, dtype=torch.long), 0)
    middle = found[:, 16, 15:17, 0].int()  # (20000, 2): the value is the column it came from
    mirrored = middle[:, 0] > middle[:, 1]
    assert abs(mirrored.float().mean() - 0.5) < 5 * 0.5 / 20_000**0.5
    shifts = torch.where(mirrored, middle[:, 0] - 16, middle[:, 0] - 15)
    counts = (shifts + 4).bincount(minlength=9).float()
    assert counts.numel() == 9
    assert ((counts - 20_000 / 9).abs() < 5 * (20_000 * (1 / 9) * (8 / 9)) ** 0.5).all()

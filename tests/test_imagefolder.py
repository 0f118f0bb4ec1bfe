"""Images in class folders and tar shards: any layout and mode, damage named, streamed batches as functions of the step."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mango import data, models
from mango.data import photographs
from mango.data.decode import decode_image
from mango.data.recipe import Recipe
from mango.errors import ConfigError, DataError
from mango.training import checkpoint
from mango.training.config import load, resolve
from mango.training.loop import train

ROOT = Path(__file__).resolve().parents[1]

CLASSES = ("ant", "bee", "elk")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MANGO_DATA", "")


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = (20, 12), format: str = "PNG") -> bytes:
    """Noise whose mean grows with ``number``."""
    pixels = np.random.default_rng(number).integers(0, 60 + 5 * number, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def folders(root: Path, *, test: str = "val", count: int = 6) -> Path:
    """Grey, palette, CMYK and colour images of odd sizes, one class with nothing in it, one image a folder deeper."""
    kinds = [("L", "PNG", (9, 31)), ("P", "PNG", (33, 16)), ("CMYK", "JPEG", (40, 25)), ("RGB", "JPEG", (16, 16)), ("LA", "PNG", (17, 19))]
    for split in ("train", test):
        for place, label in enumerate(CLASSES):
            (root / split / label / "images").mkdir(parents=True)
            for number in range(count):
                mode, format, size = kinds[number % len(kinds)]
                folder = root / split / label / ("images" if number == 0 else "")
                (folder / f"{number}.{format}").write_bytes(picture(10 * place + number % 5, mode, size, format))
        (root / split / "void").mkdir()
    return root


def shards(root: Path) -> Path:
    """Two training shards and one for tests; labels in .cls files, those of the second in .json."""
    for split, name, first in (("train", "0000", 0), ("train", "0001", 6), ("val", "0000", 12)):
        (root / split).mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / split / f"{name}.tar", "w") as archive:
            for number in range(first, first + 6):
                label = number % 3 + 9  # 9, 10, 11: by number, not by name
                texts = {"json": json.dumps({"label": label})} if name == "0001" else {"cls": str(label)}
                contents = {"jpg": picture(number % 20, format="JPEG"), **{kind: text.encode() for kind, text in texts.items()}}
                for kind, content in contents.items():
                    member = tarfile.TarInfo(f"{number:05d}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return root


@pytest.mark.parametrize(("test", "decode"), [("val", "once"), ("test", "streamed")])
def test_any_folders_are_read_and_an_empty_class_is_named_and_stays_an_output(tmp_path: Path, test: str, decode: str) -> None:
    root = folders(tmp_path / "my animals", test=test)
    with pytest.warns(UserWarning, match="class void has no training images"):
        loaded = data.load("imagefolder", root=str(root), size=16, decode=decode)
    assert (loaded.title, loaded.source, loaded.classes) == ("my animals", "local", [*CLASSES, "void"])
    assert {name: len(split) for name, split in loaded.splits.items()} == {"train": 18, "test": 18}
    found = loaded.identity()
    assert (found["corrupt"], found["empty"]) == (0, ["void"])
    images, labels = loaded.batch(0, 9, seed=0)
    assert images.shape == (9, 3, 16, 16) and images.isfinite().all()
    assert set(labels.tolist()) <= {0, 1, 2}
    assert sum(len(labels) for _, labels in loaded.evaluation("test", 4)) == 18
    with pytest.raises(DataError, match=r"no training images of class void: data\.empty = warn"):
        data.load("imagefolder", root=str(root), size=16, decode=decode, empty="error")


def test_both_ways_of_decoding_give_the_same_test_images(tmp_path: Path) -> None:
    root = shards(tmp_path / "shards")
    once, streamed = (data.load("imagefolder", root=str(root), size=16, decode=decode) for decode in ("once", "streamed"))
    assert once.classes == streamed.classes == ["9", "10", "11"]
    (a, labels), (b, others) = next(once.evaluation("test", 6)), next(streamed.evaluation("test", 6))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(a * once.std[:, None, None] + once.mean[:, None, None], b * std + mean)
    assert torch.equal(labels, others) and labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_streamed_batches_depend_on_step_and_seed_alone(tmp_path: Path) -> None:
    options = {"root": str(folders(tmp_path / "set")), "size": 16, "decode": "streamed", "randaugment": 9, "mixup": 0.2, "smoothing": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ahead, alone = (data.load("imagefolder", **options, workers=workers) for workers in (1, 0))
    inorder = [ahead.batch(step, 4, seed=3) for step in range(6)]  # beyond the end of an epoch
    for step in (5, 0, 3):
        torch.rand(7)  # the global generator has no say
        for mine, theirs in zip(alone.batch(step, 4, seed=3), inorder[step], strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(alone.batch(0, 4, seed=4)[0], inorder[0][0])
    assert not torch.equal(inorder[0][0], inorder[1][0])


@pytest.mark.parametrize("decode", ["once", "streamed"])
def test_a_damaged_image_is_named_and_skipped_only_when_asked(tmp_path: Path, decode: str) -> None:
    root = folders(tmp_path / "set")
    victim = root / "train" / "bee" / "3.JPEG"
    victim.write_bytes(victim.read_bytes()[:40])

    def read(corrupt: str) -> data.base.Dataset:
        loaded = data.load("imagefolder", root=str(root), size=16, decode=decode, corrupt=corrupt, augment=False)
        for step in range(3):
            loaded.batch(step, 6, seed=0)
        return loaded

    with pytest.raises(DataError, match=f"{victim} is not a whole image"):
        read("error")
    with pytest.warns(UserWarning, match=f"skipped: {victim} is not a whole image"):
        loaded = read("skip")
    assert loaded.identity()["corrupt"] == 1
    with pytest.raises(DataError, match=f"{victim} is not a whole image"):  # what was skipped is not taken for whole later
        read("error")


@pytest.mark.parametrize("decode", ["once", "streamed"])
def test_a_shard_that_is_cut_off_is_named_and_gives_what_is_whole(tmp_path: Path, decode: str) -> None:
    root = shards(tmp_path / "shards")
    victim = root / "train" / "0001.tar"
    victim.write_bytes(victim.read_bytes()[:5000])
    with pytest.raises(DataError, match=f"{victim} is not a whole shard"):
        data.load("imagefolder", root=str(root), size=16, decode=decode)
    with pytest.warns(UserWarning, match=f"skipped: {victim} is not a whole shard"):
        loaded = data.load("imagefolder", root=str(root), size=16, decode=decode, corrupt="skip")
    assert loaded.identity()["corrupt"] == 1 and 6 < len(loaded.splits["train"]) < 12


def test_a_subset_of_the_classes_is_the_first_by_name(tmp_path: Path) -> None:
    root = folders(tmp_path / "set")
    loaded = data.load("imagefolder", root=str(root), size=16, classes=2, train=6, validation=4)
    assert loaded.classes == ["ant", "bee"]
    assert {name: len(split) for name, split in loaded.splits.items()} == {"train": 6, "test": 12, "validation": 4}
    with pytest.raises(ConfigError, match=r"data\.classes = 9 is not legal: at most the 4 classes"):
        data.load("imagefolder", root=str(root), classes=9)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "set" / "train" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match=r"val is missing: expected <root>"):
        data.load("imagefolder", root=str(tmp_path / "set"))
    (tmp_path / "set" / "val" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train holds no images: expected <root>"):
        data.load("imagefolder", root=str(tmp_path / "set"))
    with pytest.raises(ConfigError, match=r"data\.root"):
        data.load("imagefolder", root=str(tmp_path / "absent"))


def test_photographs_stand_in_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found, origin = data.find("imagefolder", "auto")
    assert (found, origin.title) == ("embedded", "patches of photographs (embedded stand-in)")
    monkeypatch.setattr(photographs, "FILES", ("coins.png", "rocket.jpg"))
    loaded = data.load("imagefolder", size=16, classes=20, train=60, test=20)  # it gives the classes that it has
    assert loaded.classes == ["coins", "rocket"] and set(loaded.splits["train"].labels.tolist()) == {0, 1}
    with pytest.raises(DataError, match=r"tiny-imagenet-100\.tar\.xz"):
        data.load("imagefolder", source="local")


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(file, "PNG")
    assert np.unique(decode_image(file.getvalue(), 8)).tolist() == [40000 >> 8]


def test_mixup_and_smoothing_give_the_probabilities_of_their_papers() -> None:
    inputs, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 2])
    same, smooth = Recipe(smoothing=0.3).mix(inputs, labels, 3, seed=0)
    assert torch.equal(same, inputs)
    torch.testing.assert_close(smooth[0], torch.tensor([0.8, 0.1, 0.1]))
    mixed, targets = Recipe(mixup=1.0).mix(inputs, labels, 3, seed=0)
    share = targets[0, 0].item()  # of label 0, mixed with label 2
    torch.testing.assert_close(mixed[0], share * inputs[0] + (1 - share) * inputs[3])
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    shares = torch.tensor([Recipe(mixup=0.2).mix(inputs, labels, 3, seed)[1][0, 0].item() for seed in range(500)])
    assert abs(shares.mean() - 0.5) < 0.08 and abs(shares.var() - 0.25 / 1.4) < 0.04  # of Beta(0.2, 0.2)


def test_randaugment_changes_images_one_by_one_and_leaves_the_global_generator() -> None:
    images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    state = torch.get_rng_state()
    changed = Recipe(randaugment=20).augment(images, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    assert 0 < sum(torch.equal(a, b) for a, b in zip(changed, images, strict=True)) + 1 < 9
    assert torch.equal(changed, Recipe(randaugment=20).augment(images, seed=1))


TIER = """
tier: test
experiments:
  animals:
    seeds: [0]
    minutes: 1
    data: {{name: imagefolder, root: {root}, size: 16, decode: streamed, corrupt: skip, randaugment: 9, mixup: 0.2, smoothing: 0.1}}
    model: {{name: resnet, width: 16, blocks: [1, 1], stem: patch2}}
    train: {{steps: 9, batch: 5, eval_every: 3, log_every: 3, checkpoint_every: 4, ema: 0.5}}
    variants:
      mango: {{optimizer: mango, options: {{lr: 3e-3}}}}
"""
KILLED = """
import os, signal, sys
from mango.training.config import load, resolve
from mango.training.loop import train

def stop(kind, done, total):
    if kind == "steps" and done == 6:
        os.kill(os.getpid(), signal.SIGKILL)

train(resolve(load(sys.argv[1]), "animals", "mango", 0), sys.argv[2], progress=stop)
"""


@pytest.mark.filterwarnings("ignore:skipped", "ignore:.*has no training images")
def test_a_run_that_is_killed_within_an_epoch_resumes_to_the_unbroken_numbers(tmp_path: Path) -> None:
    root = folders(tmp_path / "set")
    for label in ("ant", "elk"):  # one is met before the checkpoint, or both, or none: the count is the unbroken run's
        (root / "train" / label / "2.JPEG").write_bytes(b"damaged")
    file = tmp_path / "tier.yaml"
    file.write_text(TIER.format(root=root))
    run = resolve(load(file), "animals", "mango", 0)
    whole = train(run, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(file), str(tmp_path / "killed")]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=250)
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "killed" / "checkpoint.pt")["counters"]["step"] == 4  # of 3 steps an epoch
    done = train(run, tmp_path / "killed", resume=True)
    assert done.resumed == [4]
    assert (done.metrics, done.data, done.contraction) == (whole.metrics, whole.data, whole.contraction)
    assert whole.data.corrupt == 2 and whole.data.empty == ["void"]
    models = [torch.load(tmp_path / name / "model.pt", weights_only=True)["model"] for name in ("whole", "killed")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


@pytest.mark.parametrize("name", ["resnet50", "vit"])
def test_torchvisions_models_take_the_sizes_of_their_papers(name: str) -> None:
    with torch.device("meta"):
        model = models.get(name, classes=1000)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == {"resnet50": 25_557_032, "vit": 86_567_656}[name]


def test_a_transformer_for_other_images_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tier.yaml"
    file.write_text(TIER.format(root="x").replace("{name: resnet, width: 16, blocks: [1, 1], stem: patch2}", "{name: vit, size: 32}"))
    with pytest.raises(ConfigError, match=r"model\.size = 32 is not legal: 16, as the images are"):
        load(file)
    with pytest.raises(ConfigError, match=r"model\.patch = 16 is not legal: a divisor of model\.size = 20"):
        models.get("vit", classes=2, size=20)

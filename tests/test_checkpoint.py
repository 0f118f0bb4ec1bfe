"""The schedule in closed form, and files that are whole or absent."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mango.errors import DataError
from mango.training import atomic, checkpoint, schedule

# schedule


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("constant", [0.25, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 1.0, 0.55, 0.145]),
        ("cosine", [0.25, 1.0, 0.55, 0.122150]),
        ("warmdown", [0.25, 1.0, 0.85, 0.175]),  # flat to step 12, then down over 12
    ],
)
def test_the_schedule_has_its_closed_form(kind: str, values: list[float]) -> None:
    found = [schedule.factor(step, 24, kind, warmup=4, floor=0.1, warmdown=0.5) for step in (0, 4, 14, 23)]
    if kind == "cosine":
        values[-1] = 0.1 + 0.9 * (1 + math.cos(math.pi * 19 / 20)) / 2
    assert found == pytest.approx(values, abs=1e-12)


# files


def test_an_atomic_write_that_fails_leaves_the_previous_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write(path, lambda file: file.write(b"first"))

    def fail(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic.write(path, fail)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"model": torch.zeros(3)})
    (tmp_path / "checkpoint.pt.partial").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(OSError, match=r"checkpoint\.pt") as error:
        checkpoint.save(path, {"model": torch.ones(100_000)})
    assert error.value.errno == 28 or "disk full" in str(error.value)
    assert torch.equal(checkpoint.load(path)["model"], torch.zeros(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"model": torch.zeros(1000)})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    else:
        torch.save({"version": 99}, path)
    with pytest.raises(DataError, match=r"checkpoint\.pt is not a"):
        checkpoint.load(path)

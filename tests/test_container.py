"""The Debian stage of the Dockerfile is built for real, without a Docker engine, and runs ``mango doctor`` and the smoke tier.

Slow (a quarter of an hour). Needs root, buildah and debootstrap (apt-get install buildah debootstrap), and package registries within reach.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import checkout
import pytest

HOME = "/home/mango/mango"
OWNER = 1000  # the image's user


class Builder:
    """buildah with a storage of its own, which goes with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for tool in ("buildah", "debootstrap"):
            assert shutil.which(tool), f"apt-get install {tool}"

    def __call__(self, *arguments: str | Path, timeout: float = 5400) -> str:
        storage = ["--root", self.folder / "storage", "--runroot", self.folder / "run", "--storage-driver", "vfs"]
        command = [str(part) for part in ("buildah", *storage, *arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout.strip()


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[Builder]:
    yield Builder(tmp_path)
    shutil.rmtree(tmp_path / "storage", ignore_errors=True)


def base_image(builder: Builder, folder: Path) -> str:
    """A minimal Debian 12, as debian:bookworm-slim."""
    system = folder / "debian"
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(system)], check=True, capture_output=True)
    container = builder("from", "scratch")
    builder("add", container, system, "/")
    builder("commit", "--rm", container, "localhost/debian-bookworm")
    shutil.rmtree(system)
    return "localhost/debian-bookworm"


def pip_settings(folder: Path) -> list[str]:
    """Volumes that give the build this machine's pip settings: a pip.conf whose local files and folders are mounted beside it."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    values: dict[str, set[str]] = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        values.setdefault(key.rpartition(".")[2], set()).update(value.strip("'\"").split())
    volumes, lines = [], ["[global]"]
    for key, parts in values.items():
        inside = []
        for part in sorted(parts):
            path = Path(part.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                top = path.parent if path.name == "simple" else path  # an index links to files beside it
                target = f"/mnt/pip{top}"
                volumes.append(f"--volume={top}:{target}:ro")
                part = part.replace(str(top), target)
            inside.append(part)
        lines.append(f"{key} = {' '.join(inside)}")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    return [*dict.fromkeys(volumes), f"--volume={folder / 'pip.conf'}:/etc/pip.conf:ro"]


@pytest.mark.slow
def test_the_image_regenerates_the_paper_into_a_mounted_folder(builder: Builder, tmp_path: Path) -> None:
    base = base_image(builder, tmp_path)
    tree = checkout.copy(tmp_path / "context")
    arguments = ["--isolation=chroot", "--layers=false", f"--build-arg=BASE_IMAGE={base}", *pip_settings(tmp_path)]
    builder("build", *arguments, "--tag", "localhost/mango", tree)
    results = tmp_path / "results"
    results.mkdir()
    shutil.chown(results, OWNER, OWNER)

    container = builder("from", "localhost/mango")
    run = ["run", "--isolation=chroot", f"--volume={results}:{HOME}/results", container, "--"]
    assert builder(*run, "id", "-un") == "mango", "the image must not run as root"
    doctor = builder(*run, "mango", "doctor")
    assert "torch" in doctor
    builder(*run, "bash", "-c", "make smoke && cp paper/build/smoke/mango.pdf results/smoke/")
    assert (results / "smoke" / "mango.pdf").read_bytes().startswith(b"%PDF")
    assert (results / "smoke" / "report.html").stat().st_size > 0
    assert list(results.glob("smoke/cifar10/*/0/run.json"))

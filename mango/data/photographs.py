"""The embedded stand-in for ImageNet: photographs that ship with scikit-image, cut into patches and laid out as class folders."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from mango.compat import require
from mango.data.sources import cache_root, locked
from mango.errors import MissingExtra

# Those in the package itself: its others are downloaded. Each photograph is a class.
FILES = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
PATCH = 64  # pixels on a side
STRIDE = 32
TEST_EVERY = 5  # every fifth row of patches is for testing; the rows that overlap it are not used


def photographs() -> Path:
    """``{train,val}/<photograph>/<row>-<column>.png`` in the cache, made on first use.

    Train and test patches do not overlap. Raises: MissingExtra.
    """
    try:
        made = f"photographs-{version('scikit-image')}"
    except PackageNotFoundError as error:
        raise MissingExtra.of("scikit-image", "experiments", "the embedded photographs") from error
    Image = require("PIL.Image", extra="experiments", purpose="decoding images")
    target = cache_root() / made
    with locked(target.with_suffix(".lock")):
        if not target.is_dir():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process: we hold the lock
            package = find_spec("skimage")
            assert package is not None and package.submodule_search_locations  # its version was found
            for name in FILES:
                with Image.open(Path(package.submodule_search_locations[0]) / "data" / name) as file:
                    _cut(file.convert("RGB"), partial, Path(name).stem)
            partial.rename(target)
    return target


def _cut(image, folder: Path, label: str) -> None:  # type: ignore[no-untyped-def]  # a PIL image
    width, height = image.size
    for split in ("train", "val"):
        (folder / split / label).mkdir(parents=True, exist_ok=True)
    for row, top in enumerate(range(0, height - PATCH + 1, STRIDE)):
        place = row % TEST_EVERY
        if place in (TEST_EVERY - 2, 0) and row > 0:  # overlap the row between them
            continue
        split = "val" if place == TEST_EVERY - 1 else "train"
        for column, left in enumerate(range(0, width - PATCH + 1, STRIDE)):
            image.crop((left, top, left + PATCH, top + PATCH)).save(
                folder / split / label / f"{row:02d}-{column:02d}.png", compress_level=1
            )

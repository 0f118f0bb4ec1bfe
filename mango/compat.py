"""Optional packages, imported where they are used, and the one repair that one of them needs.

``require`` turns an absent package into an error that names the command that installs it.

``torchvision`` registers its C++ operators when it is imported. Where its operator library is absent, or was built for another torch or
CUDA than the one installed, ``import torchvision`` itself fails with "operator torchvision::nms does not exist" in its shape inference,
although none of the datasets or models that we use calls it. We declare the schemas of the two operators that the import asks for (``nms``,
``qnms``) *only where they are absent*: the import succeeds, and a call to them still fails, loudly, because there is no kernel behind them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mango.errors import MissingExtra

_TORCHVISION_LIBRARY: Any = (
    None  # a torch.library.Library unregisters its operators when it is collected, so it is kept for the process's life
)


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional package.

    Raises: MissingExtra, with the install command, when it is not installed.
    """
    if find_spec(module.partition(".")[0]) is None:
        raise MissingExtra.of(module, extra, purpose)
    return import_module(module)


def torchvision(purpose: str) -> Any:
    """The torchvision module, with its operators' schemas declared when the installed build brings no operators (see the module's text)."""
    global _TORCHVISION_LIBRARY
    import torch

    if find_spec("torchvision") is None:
        raise MissingExtra.of("torchvision", "experiments", purpose)
    if _TORCHVISION_LIBRARY is None and not _torchvision_has_operators():
        _TORCHVISION_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                _TORCHVISION_LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return import_module("torchvision")


def transforms(purpose: str) -> Any:
    """torchvision's second generation of transforms, which torchvision does not import by itself."""
    torchvision(purpose)
    return import_module("torchvision.transforms.v2")


def transformers(purpose: str) -> Any:
    """The transformers module. It imports torchvision where that is installed, which may need the repair above."""
    if find_spec("torchvision") is not None:
        torchvision(purpose)
    return require("transformers", extra="llama", purpose=purpose)


def _torchvision_has_operators() -> bool:
    """Whether torchvision's operator library loads into this torch, without importing torchvision: that import is what fails."""
    import torch

    spec = find_spec("torchvision")
    locations = spec.submodule_search_locations if spec is not None else None
    for library in sorted(Path(next(iter(locations))).glob("_C*")) if locations else []:
        try:
            torch.ops.load_library(str(library))
        except OSError:  # built for another torch or CUDA
            return False
        return True
    return False

"""Optional packages, imported where they are used, and the repairs that two of them need.

``require`` turns an absent package into an error that names the command that installs it.

``torchvision`` registers its C++ operators when it is imported. Where its operator library is absent, or was built for another torch or
CUDA than the one installed, ``import torchvision`` itself fails with "operator torchvision::nms does not exist" in its shape inference,
although none of the datasets or models that we use calls it. We declare the schemas of the two operators that the import asks for (``nms``,
``qnms``) *only where they are absent*: the import succeeds, and a call to them still fails, loudly, because there is no kernel behind them.

``bitsandbytes`` (0.50.2) decodes four-bit matrices wrongly on processors with AVX-512 where a row does not end with a block: a matrix
(128, 352) in blocks of 64 comes back with a relative error of 0.25 in the place of 0.09. Its loop over one long row is right, and the codes
lie in memory alike, so such matrices are decoded as one row.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

from mango.errors import ConfigError, MissingExtra

# a torch.library.Library takes back what it registered when it is collected, so it is kept for the process's life
_TORCHVISION_LIBRARY: Any = None
_BITSANDBYTES_LIBRARY: Any = None


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


def bitsandbytes(purpose: str) -> Any:
    """The bitsandbytes module, whose four-bit matrices are decoded right whatever the length of a row (see the module's text).

    Raises: MissingExtra; ConfigError for a torch in which an operator cannot be repaired.
    """
    global _BITSANDBYTES_LIBRARY
    import torch

    module = require("bitsandbytes", extra="llama", purpose=purpose)
    if not hasattr(torch.library, "get_kernel"):
        raise ConfigError.of("torch", torch.__version__, f"2.9 or later, for {purpose}")
    if _BITSANDBYTES_LIBRARY is None:
        operator = "bitsandbytes::dequantize_4bit"
        original = torch.library.get_kernel(operator, "CPU")

        def decode(keys: Any, codes: Any, absmax: Any, block: int, kind: str, shape: list[int], dtype: Any) -> Any:
            row = shape if shape[-1] % block == 0 else [prod(shape)]
            return original.call_boxed(keys, codes, absmax, block, kind, row, dtype).view(shape)

        _BITSANDBYTES_LIBRARY = torch.library.Library("bitsandbytes", "IMPL")
        with catch_warnings():
            simplefilter("ignore", UserWarning)  # that a kernel is replaced
            _BITSANDBYTES_LIBRARY.impl(operator, decode, "CPU", with_keyset=True, allow_override=True)
    return module


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

"""``mango doctor``: what is installed, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mango.errors import MangoError

# module -> (distribution, extra): what each extra brings that is looked up by name
EXTRAS = {
    "native": {"numba": "numba"},
    "experiments": {
        "pydantic": "pydantic",
        "yaml": "PyYAML",
        "tqdm": "tqdm",
        "jsonschema": "jsonschema",
        "PIL": "pillow",
        "torchvision": "torchvision",
        "sklearn": "scikit-learn",
        "skimage": "scikit-image",
        "bitsandbytes": "bitsandbytes",
        "galore_torch": "galore-torch",
        "pynvml": "nvidia-ml-py",
        "wandb": "wandb",
        "safetensors": "safetensors",
    },
    "llama": {"transformers": "transformers", "accelerate": "accelerate", "peft": "peft"},
    "theory": {"sympy": "sympy", "scipy": "scipy", "PEPit": "PEPit"},
    "workflow": {"snakemake": "snakemake", "pygments": "pygments"},
    "notebooks": {"papermill": "papermill", "ipykernel": "ipykernel", "matplotlib": "matplotlib", "pandas": "pandas"},
    "dev": {"pytest": "pytest", "hypothesis": "hypothesis", "ruff": "ruff", "mypy": "mypy", "snakefmt": "snakefmt"},
}
TEX_PACKAGES = "texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended texlive-science lmodern latexmk"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        group, name: what was looked for.
        ok: whether it is there and works.
        detail: version or place, or what is wrong.
        remedy: how to get it; empty when ok.
        required: whether mango itself needs it (the rest is optional).
    """

    group: str
    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = False

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    return [finding for part in (_core, _extras, _latex, _accelerator, _energy, _data, _folders) for finding in part()]


def text(findings: list[Finding]) -> str:
    """The findings as aligned text, with the remedies."""
    lines, group = [], ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines.append(f"{group}")
        mark = "ok     " if finding.ok else "MISSING" if finding.required else "absent "
        lines.append(f"  {mark} {finding.name:<16} {finding.detail}".rstrip())
        if finding.remedy:
            lines.append(f"          {'':<16} {finding.remedy}")
    whole = all(finding.ok for finding in findings if finding.required)
    lines.append("The core is fine." if whole else "The core is not complete: see MISSING above.")
    return "\n".join(lines)


def _core() -> Iterator[Finding]:
    new = sys.version_info >= (3, 11)
    yield Finding("core", "python", new, platform.python_version(), "" if new else "python 3.11 or newer", required=True)
    for name in ("torch", "numpy"):
        if find_spec(name) is None:
            yield Finding("core", name, False, "not installed", f"pip install {name}", required=True)
            continue
        detail = version(name)
        if name == "torch":
            import torch

            detail += f" ({'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU build'}, {torch.get_num_threads()} threads)"
        yield Finding("core", name, True, detail, required=True)
    from mango import __version__

    yield Finding("core", "mango", True, f"{__version__} from {Path(__file__).resolve().parent}", required=True)


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        for module, package in modules.items():
            if find_spec(module) is None:
                yield Finding(f"extra {extra}", package, False, "not installed", f"pip install '.[{extra}]'")
                continue
            yield Finding(f"extra {extra}", package, *_import_check(module, package))


def _import_check(module: str, package: str) -> tuple[bool, str]:
    """Version of a package that is there; torchvision is imported too, because it may be there and still not load."""
    try:
        found = distribution(package).version
    except PackageNotFoundError:
        found = "unknown version"
    if module == "torchvision":
        from mango.compat import torchvision

        try:
            torchvision("mango doctor")
        except (RuntimeError, ImportError, OSError) as error:
            return False, f"{found}, but it does not load: {' '.join(str(error).split())}"
    return True, found


def _latex() -> Iterator[Finding]:
    programs = {name: shutil.which(name) for name in ("latexmk", "tectonic")}
    found = next(((name, place) for name, place in programs.items() if place), None)
    if found:
        yield Finding("paper", "LaTeX", True, f"{found[0]} at {found[1]}")
    else:
        yield Finding(
            "paper", "LaTeX", False, "neither latexmk nor tectonic on PATH", f"apt-get install {TEX_PACKAGES}, or install tectonic"
        )


def _accelerator() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device" if torch.version.cuda else "this torch is a CPU build"
        yield Finding("machine", "GPU", False, reason, "a CUDA build of torch and an NVIDIA driver; everything also runs on the CPU")
        return
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        yield Finding("machine", f"GPU {device}", True, f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")


def _energy() -> Iterator[Finding]:
    from mango.telemetry import PowerSampler

    with PowerSampler(interval=0.01) as power:
        pass
    if power.source is not None:
        yield Finding("machine", "energy", True, f"source {power.source}")
    else:
        yield Finding(
            "machine",
            "energy",
            False,
            power.reason or "",
            "NVML or nvidia-smi with a GPU, or readable /sys/class/powercap counters; records say null otherwise",
        )


def _data() -> Iterator[Finding]:
    from mango import data

    for name in data.NAMES:
        remedy = "set MANGO_DATA to the folder that holds it" + (", or run: mango data fetch cifar10" if name == "cifar10" else "")
        try:
            source, origin = data.find(name, "auto")
        except MangoError as error:
            yield Finding("data", name, False, str(error), remedy)
            continue
        place = getattr(origin, "path", getattr(origin, "root", ""))
        real = source != "embedded" or name == "digits"
        yield Finding("data", name, real, f"{origin.title} ({source}) {place}".strip(), "" if real else remedy)


def _folders() -> Iterator[Finding]:
    def check(name: str, find: Callable[[], Path]) -> Finding:
        try:
            folder = find()
        except (OSError, MangoError) as error:
            return Finding("folders", name, False, str(error), "make it writable or choose another")
        writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222 != 0
        return Finding(
            "folders",
            name,
            writable,
            str(folder) + ("" if writable else " is read-only"),
            "" if writable else "make it writable or choose another",
        )

    from mango.data.sources import cache_root

    yield check("cache", cache_root)
    yield check("working folder", Path.cwd)

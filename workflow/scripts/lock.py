"""Write requirements.lock: the exact version of every package that pyproject.toml's extras reach in this environment.

    .venv/bin/python workflow/scripts/lock.py > requirements.lock

The closure is taken over the installed packages' own metadata, so what happens to be installed besides is left out. Local version labels
(``+cpu``) are dropped: pip then takes the CPU build of torch where such a wheel lies at hand and the CUDA build elsewhere, whose own
requirements pin the CUDA libraries.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
HEADER = """\
# Every package of mango[all], pinned, for Python 3.11 on Linux. Written by workflow/scripts/lock.py; do not edit by hand.
# torch carries no build label on purpose: pip takes a CPU wheel where one lies at hand, the CUDA build elsewhere.
"""


def declared() -> list[Requirement]:
    """What pyproject.toml asks for: the dependencies, all extras and the build system."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    name = project["project"]["name"]
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        lines += [line for line in extra if not line.startswith(name)]
    return [Requirement(line) for line in lines]


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Package name -> installed version (local label dropped) of everything the requirements reach."""
    pins: dict[str, str] = {}
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        pins[name] = Version(metadata.version(name)).public
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                todo.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return pins


def locked(path: Path = ROOT / "requirements.lock") -> dict[str, str]:
    """Package name -> version in a lock file; every line is ``name==version``."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==", 1) for line in lines)


if __name__ == "__main__":
    print(HEADER + "\n".join(f"{name}=={version}" for name, version in sorted(closure(declared()).items())))

"""The set-up: a lock that covers every extra, and a script that finds its work done."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mango import doctor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import lock  # noqa: E402


def test_lock_is_the_closure_of_every_extra() -> None:
    """Complete (nothing that an extra reaches is missing), minimal, and what is installed."""
    assert lock.locked() == lock.closure(lock.declared())


def test_lock_meets_the_declared_ranges() -> None:
    pins = lock.locked()
    for requirement in lock.declared():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_lock_is_fully_pinned_and_names_no_build_of_torch() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9.-]+==[^+\s;]+", line), line
    cuda = [line for line in lines if line.startswith(("triton", "cuda-", "nvidia-")) and not line.startswith("nvidia-ml-py==")]
    assert not cuda, "CUDA libraries are pinned by torch's own requirements"
    assert "torch==2.13.0" in lines


def test_extra_all_holds_every_other_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras.pop("all")
    assert Requirement(everything).extras == set(extras)


def test_conda_environment_takes_the_same_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock"]
    assert {"python=3.11", "tectonic"} <= {entry for entry in environment["dependencies"] if isinstance(entry, str)}


def test_setup_says_in_one_sentence_which_python_is_needed(tmp_path: Path) -> None:
    """An interpreter that is too old stops the set-up before anything is made."""
    scripts = tmp_path / "workflow" / "scripts"
    scripts.mkdir(parents=True)
    for name in ("requirements.lock", "pyproject.toml", "workflow/scripts/setup.sh"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        ["bash", str(scripts / "setup.sh")], env={"PATH": "/usr/bin:/bin", "PYTHON": "false"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def bare_machine(folder: Path, **commands: str) -> dict[str, str]:
    """An environment whose PATH holds a few system tools, this Python, and the given shell scripts; no LaTeX, no apt-get."""
    folder.mkdir()
    for tool in ("bash", "cat", "sha256sum", "cut", "wc", "dirname", "grep", "mkdir", "rm", "tail"):
        (folder / tool).symlink_to(shutil.which(tool) or "")
    for name, body in ({"python3": f'exec {sys.executable} "$@"'} | commands).items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder), "PYTHON": "python3"}


def run_setup(tmp_path: Path, **commands: str) -> subprocess.CompletedProcess[str]:
    for name in ("requirements.lock", "pyproject.toml", "workflow/scripts/setup.sh"):
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    environment = bare_machine(tmp_path / "bin", **commands)
    return subprocess.run(["bash", str(tmp_path / "tree/workflow/scripts/setup.sh")], env=environment, capture_output=True, text=True)


def test_setup_names_the_packages_where_it_may_not_install_them(tmp_path: Path) -> None:
    done = run_setup(tmp_path, **{"id": "echo 1000", "apt-get": "echo must not be called >&2; exit 9"})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "latexmk" in done.stderr and "texlive-science" in done.stderr
    assert not (tmp_path / "tree/.venv").exists()


def test_setup_as_root_installs_latex_with_apt_and_reports_its_failure(tmp_path: Path) -> None:
    """Both halves are stand-ins: apt-get records its calls and fails to install; the interpreter "makes" a .venv whose pip succeeds."""
    calls = tmp_path / "calls"
    pip = "#!/bin/bash\\nexit 0"
    make = f'mkdir -p .venv/bin; printf "{pip}" >.venv/bin/python; chmod +x .venv/bin/python'
    python = f'case "$*" in *--clear*) {make};; *) exec {sys.executable} "$@";; esac'
    apt = f'echo "$*" >>{calls}; case "$*" in *install*) exit 100;; esac'
    done = run_setup(tmp_path, **{"id": "echo 0", "apt-get": apt, "chmod": 'exec /bin/chmod "$@"', "python3": python})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "logs/setup-latex.log" in done.stderr
    assert "texlive-latex-extra" in calls.read_text() and "--no-install-recommends" in calls.read_text()
    assert not (tmp_path / "tree/.venv/.setup").exists(), "a failed set-up leaves no stamp"


def test_the_same_latex_packages_are_named_everywhere() -> None:
    """By the set-up, the image and ``mango doctor``."""
    script = (ROOT / "workflow/scripts/setup.sh").read_text()
    (line,) = re.findall(r'^TEX_PACKAGES="(.*)"$', script, re.MULTILINE)
    assert line == doctor.TEX_PACKAGES
    assert line in (ROOT / "Dockerfile").read_text()

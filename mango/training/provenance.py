"""What a result depends on beside its configuration: source code, packages and machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "torchvision", "bitsandbytes", "galore-torch", "pydantic", "pillow", "scikit-learn", "transformers", "wandb")


def git() -> dict[str, Any]:
    """Commit of the checkout that mango is imported from and whether tracked files differ from it; None for both outside a repository."""

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):  # no git here
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = ask("rev-parse", "--verify", "HEAD") if (CHECKOUT / ".git").exists() else None
    changes = ask("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def lock_hash() -> str | None:
    """SHA-256 of requirements.lock in the checkout, or None."""
    lock = CHECKOUT / "requirements.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None


def packages() -> dict[str, str]:
    """Versions of python and of the packages that numbers depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """CPU model, cores this process may use, the device trained on, GPU and driver (None on the CPU)."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu(), "cores": cores, "device": device.type, "gpu": gpu, "driver": _driver() if gpu else None}


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip()

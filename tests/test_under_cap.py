"""The demonstration under a hard cap of 2 GiB on everything that a process may have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def under_cap(*arguments: str) -> subprocess.CompletedProcess[str]:
    # glibc reserves 64 MB of addresses for each thread that allocates: one arena, so that the cap is on what is used
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(ROOT / "workflow" / "scripts" / "under_cap.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")
def test_at_a_cap_of_two_gigabytes_dense_adamw_fails_and_mango_finishes() -> None:
    dense = under_cap("adamw")
    assert dense.returncode == 3 and "adamw: out of memory under a cap of 2 GiB" in dense.stderr, dense.stderr
    mango = under_cap("mango")
    assert mango.returncode == 0, mango.stderr
    found = json.loads(mango.stdout)
    assert found["parameters"] > 9e7 and found["peak"] < found["cap"] == 2**31

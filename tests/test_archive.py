"""The entry script of archived runs: records as the workflow's, a table last, and a limit after which the same command goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mango.training import record

ROOT = Path(__file__).resolve().parents[1]


def archive(out: Path, minutes: float) -> subprocess.CompletedProcess[str]:
    variants = ["--variants", "adamw", "frozen", "--set", "train.steps=6", "--set", "data.source=embedded"]
    command = [sys.executable, "workflow/scripts/archive.py", "cifar10", "--config", "workflow/config/smoke.yaml", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MANGO_DATA": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--minutes", str(minutes), *variants], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )


def test_a_time_limit_leaves_runs_that_the_same_command_finishes(tmp_path: Path) -> None:
    first = archive(tmp_path, 0)
    assert first.returncode == 0, first.stderr
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["variant", "adamw", "frozen"]
    assert first.stdout.count("not run") == 2
    done = archive(tmp_path, 5)
    assert done.returncode == 0 and "not run" not in done.stdout, done.stderr
    found = record.load(tmp_path / "cifar10" / "adamw" / "0" / "run.json")
    assert (found.tier, found.steps, found.status) == ("smoke", 6, "completed")
    assert f"{found.metrics.final.test_loss:.4g}" in done.stdout

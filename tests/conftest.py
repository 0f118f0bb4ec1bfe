"""Shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

# before torch is imported, and for the processes that tests start: two workers on two cores, each with torch's default of two threads that
# spin while they wait, take several times as long as one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# examples are the same on every run and are not timed: the machines that run the tests differ
settings.register_profile("mango", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("mango")
torch.manual_seed(0)


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty data folder and an empty cache, ``data`` and ``cache`` in the test's own folder."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("MANGO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MANGO_CACHE", str(tmp_path / "cache"))

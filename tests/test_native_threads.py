"""How compiled loops are run on threads, and how they are compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mango import codecs, native
from mango.native import threads
from mango.native.jit import compiled

CPU = torch.device("cpu")


def test_threads_do_not_change_a_result() -> None:
    x, before = torch.randn(100_000), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(codecs.get("nf4").encode(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found[0].tensors(), found[1].tensors(), strict=True))


@compiled
def mark(first: int, last: int, counts: np.ndarray, ends: np.ndarray, x: np.ndarray, times: int, plus: float, out: np.ndarray) -> None:
    ends[first] = last
    for i in range(first, last):
        counts[i] += 1
        out[i] = x[1, i] * times + plus


@compiled
def fail(first: int, last: int, counts: np.ndarray) -> None:
    if first and counts.size:
        raise ValueError("it fails")


@pytest.mark.parametrize("team", [True, False] if sys.platform == "linux" else [False])  # where torch's OpenMP is GNU's
def test_every_part_of_a_range_is_run_once_on_torchs_threads_or_on_ours(team: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not team or threads._openmp() is not None
    monkeypatch.setattr(threads, "_forked", not team)
    before = torch.get_num_threads()
    counts, ends, x = torch.zeros(10, dtype=torch.int32), torch.zeros(10, dtype=torch.int32), torch.arange(20.0).view(2, 10)
    try:
        torch.set_num_threads(3)
        for matrix, expected in ((x, x[1]), (x.view(10, 2).mT, x.view(10, 2)[:, 1])):
            out = torch.zeros(10)
            threads.run(mark, 10, 1 << 20, counts, ends, matrix, 2, 0.5, out)
            assert torch.equal(out, 2 * expected + 0.5)
        assert counts.tolist() == [2] * 10
        assert ends.tolist() == [3, 0, 0, 6, 0, 0, 10, 0, 0, 0]
        with pytest.raises((RuntimeError, ValueError), match="fail"):
            threads.run(fail, 10, 1 << 20, counts)
    finally:
        torch.set_num_threads(before)


def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
import os, torch
from mango import codecs
torch.set_num_threads(2)
x = torch.ones(1 << 20)
codec = codecs.get("nf4")
codec.encode(x)
child = os.fork()
if not child:
    from mango.native import threads, codecs as loops
    out = torch.zeros(16, dtype=torch.int32)
    threads.run(loops.absmax, 16, 1 << 16, x[: 1 << 10].view(torch.int32), 64, out)
    os._exit(int(out.view(torch.float32).sum()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "16"


def test_starting_the_loops_leaves_torchs_threads() -> None:
    """In a fresh process, at Mango's first step: numba may share torch's OpenMP runtime, and a run on one thread must stay on it."""
    code = """
import torch
torch.set_num_threads(1)
from mango import Mango
layer = torch.nn.Linear(128, 128)
optimizer = Mango(layer.named_parameters())
layer(torch.randn(64, 128)).square().mean().backward()
optimizer.step()
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_an_installation_that_cannot_be_written_compiles_anew(tmp_path: Path) -> None:
    """numba refuses to cache where neither the package's folder nor the user's cache can be written."""
    shutil.copytree(Path(native.__file__).parents[1], tmp_path / "mango", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import os
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
import torch
from mango import codecs, native
codec = codecs.get("nf4")
assert native.ready(torch.device("cpu"))
print(codec.decode(codec.encode(torch.ones(100))).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "100.0"


def test_a_numba_that_does_not_load_is_said_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise ImportError(f"{name} needs another numpy")

    monkeypatch.setattr(native, "import_module", fails)
    native._installed.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="numba does not load"):
            assert not native.ready(CPU)
        codec = codecs.get("nf4")
        assert float(codec.decode(codec.encode(torch.ones(100))).sum()) == 100.0
    finally:
        native._installed.cache_clear()

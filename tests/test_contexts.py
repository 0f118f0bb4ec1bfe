"""Memory against context length: what the script measures, how it searches, and that its records are run records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mango.training import record

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import contexts  # noqa: E402

ABSENT = ["pydantic", "yaml", "transformers", "bitsandbytes", "tokenizers", "pyarrow", "numba", "tqdm"]


@given(true=st.integers(8, 5000), start=st.integers(1, 8), limit=st.integers(64, 4096))
def test_the_longest_context_is_found_to_a_sixteenth(true: int, start: int, limit: int) -> None:
    asked: list[int] = []

    def good(length: int) -> bool:
        asked.append(length)
        return length <= true

    found = contexts.longest(good, start, limit)
    best = min(true, limit)
    assert found <= best and best - found <= max(1, best // 16)
    assert max(asked) <= limit and len(asked) <= 24


def test_nothing_fits_where_the_shortest_does_not() -> None:
    assert contexts.longest(lambda length: False, 16, 1024) == 0


def test_it_needs_torch_and_numpy_alone_and_leaves_run_records(tmp_path: Path) -> None:
    """As on a bare machine: every other package is refused."""
    script = str(ROOT / "workflow" / "scripts" / "contexts.py")
    arguments = ["--tier", "gpu", "--out", str(tmp_path), "--depth", "1", "--vocabulary", "256", "--device", "cpu"]
    arguments += ["--lengths", "32", "64", "--steps", "2", "--cap", "0.0027", "--limit", "512"]
    refuse = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT!r}))\n"  # None there makes an import fail
        f"sys.argv = {['contexts.py', *arguments]!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", refuse], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: record.load(tmp_path / "contexts" / name / "0" / "run.json") for name in contexts.METHODS}
    for name, run in found.items():
        assert (run.experiment, run.variant, run.tier) == ("contexts", name, "gpu")
        assert run.config_hash == run.config.hash(), "the settings are those of a run, every field written out"
        assert [entry.tokens for entry in run.contexts] == [32, 64]
        memory = run.memory
        total = memory.parameters + memory.gradients + memory.optimizer_state + memory.saved_activations
        assert run.contexts[-1].peak == total and run.contexts[-1].saved_activations == memory.saved_activations
        assert run.metrics.final.train_loss == pytest.approx(5.5, abs=0.3), "ln 256, about"
    kept = {name: run.contexts[-1].saved_activations for name, run in found.items()}
    assert kept["int2-hidden"] < kept["int2"] < kept["int4"] < kept["dense"] and kept["recompute"] < kept["dense"]
    assert found["dense"].longest_context < found["int2-hidden"].longest_context <= 512
    assert found["dense"].config.mole is None and found["recompute"].config.recompute

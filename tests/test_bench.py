"""The comparisons of ``mango bench`` that need no peer: rows, sizes, refusals."""

from __future__ import annotations

from math import prod

import pytest

from mango import cli
from mango.bench import optimizers as bench
from mango.bench import training
from mango.errors import ConfigError


def test_bench_rows() -> None:
    told: list[str] = []
    shapes = {"one": (64, 64), "two": (64, 128), "three": (96, 64), "head": (80, 64)}
    names = ["mango rank 8", "mango rank 8, no error", "galore rank 8"]
    rows = bench.run(rank=8, repeats=2, model=shapes, names=names, progress=told.append)
    assert [row["name"] for row in rows] == ["adamw", *names] and told == ["adamw", *names, "timing"]
    assert rows[0]["ratio"] == 1.0
    for row in rows:
        assert 0 < float(row["median_ms"]) <= float(row["worst_ms"]) and float(row["first_ms"]) > 0
    assert 8.0 <= float(rows[0]["bytes_per_parameter"]) < 8.01
    values = {name: prod(shape) for name, shape in shapes.items()}
    kept = 0.5625 * (sum(values.values()) - values["head"]) / sum(values.values())  # the head is AdamW's: it has no error
    assert float(rows[2]["bytes_per_parameter"]) + kept == pytest.approx(float(rows[1]["bytes_per_parameter"]))
    with pytest.raises(ConfigError, match="names = 'lion' is not legal: one of adamw, mango rank 8"):
        bench.run(rank=8, names=["lion"])
    with pytest.raises(ConfigError, match="model = 'bert' is not legal: one of matrices, nanochat"):
        bench.run(model="bert")


def test_bench_models_have_the_sizes_that_they_are_said_to_have() -> None:
    assert sum(map(prod, bench.matrices().values())) == 37_748_736
    blocks = [shape for name, shape in bench.nanochat().items() if name.startswith("blocks")]
    assert len(blocks) == 6 * 6 and sum(map(prod, blocks)) == 6 * 12 * 384**2


def test_bench_of_a_training_step() -> None:
    rows = training.run("tiny", tokens=64, sequence=32, repeats=2)
    assert [row["name"] for row in rows] == ["adamw", "mango"]
    for row in rows:
        assert row["parameters"] == 96 * 64 + 12 * 64**2 and 0 < float(row["step_s"]) <= float(row["worst_s"])
        assert float(row["share"]) == pytest.approx(float(row["step_s"]) / (float(row["passes_s"]) + float(row["step_s"])))
    for options, message in (
        ({"model": "gpt-5"}, "model = 'gpt-5' is not legal: one of gpt-124m"),
        ({"tokens": 100}, "tokens = 100 is not legal: a multiple of the sequence, 1024"),
        ({"repeats": 0}, "repeats = 0 is not legal"),
    ):
        with pytest.raises(ConfigError, match=message):
            training.run(**options)


def test_the_bench_command_passes_what_a_comparison_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "training", "--model", "tiny", "--repeats", "0"]) == 2
    assert "repeats = 0 is not legal" in capsys.readouterr().err
    assert cli.main(["bench", "codecs", "--model", "nanochat"]) == 2
    assert "--model = 'nanochat' is not legal: left out: mango bench codecs has no such option" in capsys.readouterr().err

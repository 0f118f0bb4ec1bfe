"""Training: schedule, record, checkpoints; same seed twice, a killed run resumed, and a run that diverges."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from mango import models
from mango.errors import ConfigError, NonFinite
from mango.training import checkpoint, record, schema
from mango.training.config import RunSpec, TierConfig, load, resolve, validated
from mango.training.loop import train
from mango.training.session import Interrupted
from mango.training.yamlfile import parse

ROOT = Path(__file__).resolve().parents[1]
TIER = """
tier: test
experiments:
  digits:
    seeds: [0, 1]
    minutes: 1
    data: {name: digits, train: 200, test: 100, validation: 50}
    model: {name: resnet, width: 16, blocks: [1, 1], stem: patch2}
    train: {steps: 16, batch: 20, eval_every: 8, log_every: 4, checkpoint_every: 5, warmup: 2}
    controls: {dense: adamw, frozen: frozen}
    variants:
      adamw: {optimizer: adamw, options: {lr: 3e-3}}
      frozen: {optimizer: adamw, options: {lr: 3e-3}, freeze: true}
      adamw8bit: {optimizer: adamw8bit, options: {lr: 3e-3}}
      galore: {optimizer: galore, options: {lr: 3e-3, update_proj_gap: 7}}
      muon: {optimizer: muon, options: {lr: 2e-2}}
      mango: {label: Mango, optimizer: mango, options: {lr: 3e-3, plan: {rank: 0.25}}}
  text:
    seeds: [0, 1, 2]
    minutes: 1
    data: {name: text, source: embedded, test: 3000, validation: 2000, sequence: 32}
    model: {name: gpt, depth: 1, width: 64, heads: 2, ffn: 2}
    exclude: [embedding, head]
    train: {steps: 12, batch: 8, eval_every: 6, eval_batch: 64, log_every: 3, checkpoint_every: 5, warmup: 2}
    controls: {dense: adamw, frozen: frozen}
    variants:
      adamw: {optimizer: adamw, options: {lr: 1e-2}}
      frozen: {optimizer: adamw, options: {lr: 1e-2}, freeze: true}
      mango: {label: Mango, optimizer: mango, options: {lr: 1e-2, plan: {rank: 0.25}}, seeds: [0]}
"""


@pytest.fixture(scope="session")
def tier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tier") / "test.yaml"
    path.write_text(TIER)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _isolated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANGO_CACHE", str(cache))
    monkeypatch.setenv("MANGO_DATA", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def spec(tier_file: Path, variant: str, *overrides: str, seed: int = 0, experiment: str = "digits") -> RunSpec:
    return resolve(load(tier_file), experiment, variant, seed, list(overrides))


def lines_without_time(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("time")
    return rows


# training


@pytest.fixture(scope="session")
def unbroken(tier_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whole run of each optimizer."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANGO_CACHE", str(cache))
        patch.setenv("MANGO_DATA", "")
        for variant in ("adamw", "mango", "adamw8bit", "galore", "muon"):
            folders[variant] = tmp_path_factory.mktemp("unbroken") / variant
            train(spec(tier_file, variant), folders[variant])
    return folders


def test_a_run_writes_its_record_metrics_and_weights_and_learns(unbroken: dict[str, Path]) -> None:
    folder = unbroken["mango"]
    assert sorted(path.name for path in folder.iterdir()) == ["memory.csv", "metrics.jsonl", "model.pt", "run.json"]
    found = record.load(folder / "run.json")
    rows = lines_without_time(folder)
    assert [(row["step"], row["split"]) for row in rows] == [
        (4, "train"),
        (8, "train"),
        (8, "test"),
        (12, "train"),
        (16, "train"),
        (16, "test"),
    ]
    assert found.metrics.final.test_loss == rows[-1]["loss"]
    assert rows[-2]["loss"] < rows[0]["loss"]  # type: ignore[operator]
    assert (found.status, found.label, found.steps, found.seed) == ("completed", "Mango", 16, 0)
    assert (found.data.title, found.data.train, found.data.test) == ("digits (embedded stand-in)", 200, 100)
    assert found.energy.joules is not None or found.energy.reason
    assert set(found.plan[0].layers) == {"blocks.1.conv1.weight", "blocks.1.conv2.weight"}
    assert found.parameters.compressed == 32 * 16 * 9 + 32 * 32 * 9
    assert {(row.step, row.layer) for row in found.contraction} == {(step, layer) for step in (8, 16) for layer in found.plan[0].layers}
    assert all(0 <= row.certified <= 1 and row.measured <= 1 + 1e-6 for row in found.contraction)
    assert found.memory.gradients == found.parameters.total * 4
    assert found.memory.saved_activations > 20 * 3 * 32 * 32 * 4


def test_the_same_seed_twice_gives_the_same_metrics_and_another_seed_does_not(
    unbroken: dict[str, Path], tier_file: Path, tmp_path: Path
) -> None:
    train(spec(tier_file, "mango"), tmp_path / "again")
    train(spec(tier_file, "mango", seed=1), tmp_path / "other")
    assert lines_without_time(tmp_path / "again") == lines_without_time(unbroken["mango"])
    assert lines_without_time(tmp_path / "other") != lines_without_time(unbroken["mango"])


KILLED = """
import os, signal, sys
from mango.training.config import load, resolve
from mango.training.loop import train

def stop(kind, done, total):
    if kind == "steps" and done == int(sys.argv[5]):
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))

train(resolve(load(sys.argv[1]), "digits", sys.argv[2], 0), sys.argv[3], progress=stop)
"""


def run_until_signal(tier_file: Path, variant: str, folder: Path, name: str, step: int) -> int:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tier_file), variant, str(folder), name, str(step)]
    return subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120).returncode


class Crash(Exception):
    """Stops a run in this process between two steps: cheaper than a process where it matters only where the run stopped."""


def crash_at(run: RunSpec, folder: Path, step: int) -> None:
    def stop(kind: str, done: int, total: int) -> None:
        if kind == "steps" and done == step:
            raise Crash

    with pytest.raises(Crash):
        train(run, folder, progress=stop)


@pytest.mark.parametrize(("variant", "kill"), [("adamw", True), ("mango", True), ("adamw8bit", True), ("galore", False), ("muon", False)])
def test_a_killed_run_resumes_bit_for_bit(unbroken: dict[str, Path], tier_file: Path, tmp_path: Path, variant: str, kill: bool) -> None:
    if kill:
        assert run_until_signal(tier_file, variant, tmp_path, "SIGKILL", 13) == -signal.SIGKILL
    else:
        crash_at(spec(tier_file, variant), tmp_path, 13)
    assert not (tmp_path / "run.json").exists()
    assert checkpoint.load(tmp_path / "checkpoint.pt")["counters"]["step"] == 10
    done = train(spec(tier_file, variant), tmp_path, resume=True)
    assert done.resumed == [10]
    assert lines_without_time(tmp_path) == lines_without_time(unbroken[variant])
    final = [torch.load(folder / "model.pt", weights_only=True)["model"] for folder in (tmp_path, unbroken[variant])]
    for name, tensor in final[0].items():
        assert torch.equal(tensor, final[1][name]), name
    whole = record.load(unbroken[variant] / "run.json")
    assert (done.metrics, done.contraction, done.plan) == (whole.metrics, whole.contraction, whole.plan)
    assert done.memory.saved_activations == whole.memory.saved_activations
    assert done.memory.optimizer_state == whole.memory.optimizer_state


def test_a_run_killed_before_its_first_checkpoint_starts_over(unbroken: dict[str, Path], tier_file: Path, tmp_path: Path) -> None:
    crash_at(spec(tier_file, "adamw"), tmp_path, 4)
    train(spec(tier_file, "adamw"), tmp_path, resume=True)
    assert lines_without_time(tmp_path) == lines_without_time(unbroken["adamw"])


def test_sigterm_writes_a_checkpoint_after_a_whole_step(unbroken: dict[str, Path], tier_file: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stop(kind: str, done: int, total: int) -> None:
        if kind == "steps" and done == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM"):
        train(spec(tier_file, "adamw"), tmp_path, progress=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.load(tmp_path / "checkpoint.pt")["counters"]["step"] in (7, 8)  # the signal may be seen one step later
    train(spec(tier_file, "adamw"), tmp_path, resume=True)
    assert lines_without_time(tmp_path) == lines_without_time(unbroken["adamw"])


def test_a_completed_run_is_neither_repeated_nor_overwritten(unbroken: dict[str, Path], tier_file: Path) -> None:
    folder = unbroken["adamw"]
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="--resume continues it, --force starts it over"):
        train(spec(tier_file, "adamw"), folder)
    train(spec(tier_file, "adamw"), folder, resume=True)
    with pytest.raises(ConfigError, match="another configuration or seed"):
        train(spec(tier_file, "adamw", "train.steps=17"), folder, resume=True)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_checkpoint_of_another_configuration_is_refused(tier_file: Path, tmp_path: Path) -> None:
    crash_at(spec(tier_file, "adamw"), tmp_path, 6)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ConfigError, match="config_hash"):
        train(spec(tier_file, "adamw", "options.lr=1e-3"), tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert train(spec(tier_file, "adamw", "train.steps=3"), tmp_path, force=True).steps == 3


def test_a_diverging_run_stops_with_its_step_and_keeps_the_last_good_checkpoint(tier_file: Path, tmp_path: Path) -> None:
    from mango.models.resnet import ResNet

    calls = 0

    def forward(self: ResNet, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += self.training
        out = original(self, x)
        return out * float("nan") if calls > 12 else out

    original = ResNet.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResNet, "forward", forward)
        with pytest.raises(NonFinite, match=r"the training loss is nan at step 13.*checkpoint\.pt"):
            train(spec(tier_file, "adamw"), tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["counters"]["step"] == 10
    assert not (tmp_path / "run.json").exists()
    train(spec(tier_file, "adamw"), tmp_path, resume=True)


def test_weights_that_overflow_never_reach_a_checkpoint(tier_file: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="at step"):
        train(spec(tier_file, "adamw", "options.lr=1e38", "train.checkpoint_every=1"), tmp_path)
    if (tmp_path / "checkpoint.pt").exists():
        assert all(
            value.isfinite().all() for value in checkpoint.load(tmp_path / "checkpoint.pt")["model"].values() if value.is_floating_point()
        )


def test_frozen_layers_keep_their_weights_and_the_rest_trains(tier_file: Path, tmp_path: Path) -> None:
    first = train(spec(tier_file, "frozen", "train.steps=3"), tmp_path / "short")
    train(spec(tier_file, "frozen"), tmp_path / "long")
    short, long = (torch.load(tmp_path / name / "model.pt", weights_only=True)["model"] for name in ("short", "long"))
    for name in ("blocks.1.conv1.weight", "blocks.1.conv2.weight"):
        assert torch.equal(short[name], long[name])
    assert not torch.equal(short["head.weight"], long["head.weight"])
    assert first.memory.gradients == (first.parameters.total - first.parameters.compressed) * 4


# text


@pytest.fixture(scope="session")
def texts(tier_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whole run of each variant on text."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANGO_CACHE", str(cache))
        for variant in ("adamw", "frozen", "mango"):
            folders[variant] = tmp_path_factory.mktemp("texts") / variant
            train(spec(tier_file, variant, experiment="text"), folders[variant])
    return folders


def test_a_language_model_goes_through_the_same_loop(texts: dict[str, Path]) -> None:
    found = record.load(texts["mango"] / "run.json")
    final, lines = found.metrics.final, lines_without_time(texts["mango"])
    assert final.test_loss == lines[-1]["loss"]
    assert final.test_bits_per_byte == pytest.approx(final.test_loss / math.log(2))
    assert final.test_accuracy is None and "accuracy" not in lines[-1]
    assert lines[0]["loss"] > lines[-1]["loss"]  # type: ignore[operator]
    assert found.throughput.unit == "bytes/s"
    assert found.data.title == "Python's documentation (embedded stand-in)"
    assert (found.data.test, found.data.validation) == (3000, 2000)
    assert found.parameters.total == 2 * 256 * 64 + 8 * 64 * 64
    assert found.contraction


def initial(tier_file: Path) -> torch.nn.Module:
    """The model with which the runs of seed 0 on text start."""
    torch.manual_seed(0)
    options = spec(tier_file, "adamw", experiment="text").config.model.model_dump(exclude={"name"})
    return models.get("gpt", vocabulary=256, **options)


def test_methods_and_controls_share_the_matrices_under_test(texts: dict[str, Path], tier_file: Path) -> None:
    found = {name: record.load(folder / "run.json") for name, folder in texts.items()}
    assert {run.parameters.compressed for run in found.values()} == {8 * 64 * 64}, "embedding and head, of 256 x 64, are left out"
    assert found["frozen"].memory.gradients == 2 * 256 * 64 * 4
    matrices = {"query", "key", "value", "out", "up", "down"}
    assert {layer.split(".")[3] for layer in found["mango"].plan[0].layers} == matrices
    start = {name: parameter.detach() for name, parameter in initial(tier_file).named_parameters()}
    for name, weight in torch.load(texts["frozen"] / "model.pt", weights_only=True)["model"].items():
        assert torch.equal(weight, start[name]) == name.startswith("blocks."), name


def test_a_killed_language_model_resumes_bit_for_bit(texts: dict[str, Path], tier_file: Path, tmp_path: Path) -> None:
    run = spec(tier_file, "mango", experiment="text")
    crash_at(run, tmp_path, 8)
    assert train(run, tmp_path, resume=True).resumed == [5]
    assert lines_without_time(tmp_path) == lines_without_time(texts["mango"])


def test_throughput_counts_targets(texts: dict[str, Path]) -> None:
    found = record.load(texts["adamw"] / "run.json")
    assert found.throughput.value >= 12 * 8 * 32 / found.wall_seconds


def test_a_pattern_that_matches_no_parameter_is_named(tier_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude = 'tail' is not legal"):
        train(spec(tier_file, "adamw", "exclude=[tail]", experiment="text"), tmp_path)


def test_tuning_runs_are_judged_on_validation_images(tier_file: Path, tmp_path: Path) -> None:
    found = train(spec(tier_file, "adamw", "data.evaluate=validation", "train.steps=4"), tmp_path)
    assert found.metrics.final.test_loss is None
    assert found.metrics.final.validation_loss is not None
    assert found.data.validation == 50


def test_the_other_settings_of_the_loop_train(tier_file: Path, tmp_path: Path) -> None:
    overrides = ["train.autocast=bf16", "train.channels_last=true", "train.clip=0.5", "train.schedule=linear", "data.augment=false"]
    found = train(spec(tier_file, "mango", "train.steps=3", *overrides), tmp_path)
    assert found.config.train.autocast == "bf16"
    assert math.isfinite(found.metrics.final.test_loss or math.nan)


# record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(status="half"), "status = 'half' is not legal: 'completed'"),
        (lambda content: content.pop("memory"), "memory is missing"),
        (lambda content: content["memory"].update(gradients="many"), "memory.gradients = 'many' is not legal: integer"),
        (lambda content: content.update(extra=1), "extra is an unknown key"),
        (lambda content: content["config"]["train"].update(steps=-1), "config.train.steps = -1 is not legal"),
        (lambda content: content.update(config_hash="x"), "config_hash = 'x' is not legal"),
    ],
)
def test_a_record_that_fails_its_schema_is_named(unbroken: dict[str, Path], tmp_path: Path, change: object, message: str) -> None:
    content = json.loads((unbroken["adamw"] / "run.json").read_text())
    change(content)  # type: ignore[operator]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        record.load(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_records_validate_against_the_exported_schema(unbroken: dict[str, Path]) -> None:
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(schema.export("run")))
    for folder in unbroken.values():
        assert not list(validator.iter_errors(json.loads((folder / "run.json").read_text())))
    assert validated(TierConfig, parse(TIER, "tier"), "tier").tier == "test"

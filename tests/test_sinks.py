"""What a run leaves beside its record: wandb's offline files, memory as CSV, joules in the log."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

from mango.errors import ConfigError
from mango.telemetry import sources
from mango.training.config import load, resolve
from mango.training.loop import train

TIER = """
tier: test
experiments:
  digits:
    seeds: [0]
    minutes: 1
    data: {name: digits, train: 200, test: 100}
    model: {name: resnet, width: 16, blocks: [1, 1], stem: patch2}
    train: {steps: 4, batch: 20, eval_every: 2, log_every: 2}
    variants:
      adamw: {optimizer: adamw, options: {lr: 3e-3}}
      mango: {optimizer: mango, options: {lr: 3e-3}}
      schedule: {optimizer: mango, options: {lr: 3e-3, policy: rankschedule, policy_every: 1, memory_budget: "3.5 bytes/param"}}
  words:
    seeds: [0]
    minutes: 1
    data: {name: text, source: embedded, train: 4000, test: 1000, sequence: 16}
    model: {name: gpt, depth: 1, width: 64, heads: 2, ffn: 1}
    train: {steps: 4, batch: 4, eval_every: 4, log_every: 2}
    variants:
      mole:
        optimizer: adamw
        options: {lr: 3e-3}
        mole: {store: int4, gradient: factored, rank: 8, fill_grad: true, targets: all, exclude: [head], diagnostics_every: 2}
"""


@pytest.fixture(scope="session")
def tier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tier") / "test.yaml"
    path.write_text(TIER)
    return path


DIAGNOSTICS = (  # see mango.mole.watch
    "energy_capture",
    "gradient_norm_compression_ratio",
    "subspace_quality",
    "trust_scaling_factor",
    "condition_number",
    "layer_memory_usage",
    "memory_saved_mb",
)


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of an offline run: a header of 7 bytes, then 32 KiB blocks of chunks (checksum, length, kind), as LevelDB has them."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, partial = path.read_bytes(), 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        partial += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            yield record
            partial = b""


def test_wandb_holds_every_metric_offline_with_step_axes_and_summary(
    tier_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    done = train(resolve(load(tier_file), "digits", "mango", 0, wandb=True), tmp_path)
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    axes = {}
    for one in wandb_records(tmp_path):
        match one.WhichOneof("record_type"):
            case "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.history.item})
            case "summary":
                summary |= {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in one.summary.update}
            case "metric":
                axes[one.metric.name or one.metric.glob_name] = one.metric.step_metric
    assert axes["*"] == "step"
    found = {key for row in rows for key in row}
    layer = done.contraction[0].layer
    for key in ("train/loss", "test/loss", "test/accuracy", "train/lr", "train/time", "memory/rss"):
        assert key in found
    for key in ("parameters", "gradients", "optimizer_state", "saved_activations"):
        assert [row[f"memory/{key}"] for row in rows if f"memory/{key}" in row][-1] == getattr(done.memory, key)
    for key in ("certified", "measured", "energy", "drift", "error_ratio"):
        assert f"layers/{layer}/{key}" in found
    assert {row["step"] for row in rows if "test/loss" in row} == {2, 4}
    assert summary["metrics.final.test_loss"] == done.metrics.final.test_loss
    assert summary["memory.rss_peak"] == done.memory.rss_peak
    for key in ("wall_seconds", "throughput.value", "energy.joules", "energy.reason", "memory.device_peak_allocated", "parameters.total"):
        assert key in summary


def test_wandb_holds_the_diagnostics_of_converted_layers(tier_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    done = train(resolve(load(tier_file), "words", "mole", 0, wandb=True), tmp_path)
    assert done.mole is not None and done.mole.converted
    found: set[str] = set()
    for one in wandb_records(tmp_path):
        if one.WhichOneof("record_type") == "history":
            found |= {item.key or "/".join(item.nested_key) for item in one.history.item}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = {(row["layer"], row["step"]) for row in rows if row["split"] == "mole"}
    assert {step for _, step in told} == {2, 4} and len(told) == 2 * 6, "six matrices"
    for layer, _ in told:
        assert {f"mole/{layer}/{name}" for name in DIAGNOSTICS} <= found


def test_memory_by_category_is_exported_as_csv(tier_file: Path, tmp_path: Path) -> None:
    done = train(resolve(load(tier_file), "digits", "mango", 0, ["train.log_every=1"]), tmp_path)
    frame = pandas.read_csv(tmp_path / "memory.csv", index_col="category")
    for key in ("parameters", "gradients", "optimizer_state", "saved_activations"):
        assert frame.loc[key, "peak"] == frame.loc[key, "median"] == getattr(done.memory, key)
    assert frame.loc["rss", "peak"] <= done.memory.rss_peak


def test_energy_is_logged_when_asked_and_can_be_required(tier_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RAPL", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"energy = 'require' is not legal: .* has no counters"):
        train(resolve(load(tier_file), "digits", "adamw", 0, energy="require"), tmp_path / "absent")
    package = tmp_path / "powercap" / "intel-rapl:0"
    package.mkdir(parents=True)
    (package / "max_energy_range_uj").write_text("1000000000000\n")
    (package / "energy_uj").write_text("5000000\n")
    monkeypatch.setattr(sources, "RAPL", package.parent)

    def count(what: str, done: int, of: int) -> None:
        if what == "steps":
            (package / "energy_uj").write_text(f"{5_000_000 + 2_000_000 * done}\n")

    done = train(resolve(load(tier_file), "digits", "adamw", 0, energy="require"), tmp_path / "run", progress=count)
    assert done.energy.joules == pytest.approx(8.0)
    assert (done.energy.source, done.energy.missed, done.energy.malformed) == ("rapl", 0, 0)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["joules"] is None or 0 <= row["joules"] <= 8.0 for row in rows)
    assert "joules" not in (tmp_path / "absent" / "metrics.jsonl").read_text()


def test_a_run_under_a_policy_records_its_plans_and_keeps_the_budget(tier_file: Path, tmp_path: Path) -> None:
    done = train(resolve(load(tier_file), "digits", "schedule", 0, ["train.log_every=1"]), tmp_path)
    assert done.memory.optimizer_state <= 3.5 * done.parameters.total
    assert [step.step for step in done.plan] == sorted({step.step for step in done.plan})
    assert len(done.plan) > 1, "the rank falls, and the record says when"
    ranks = [max(plan["rank"] for plan in step.layers.values()) for step in done.plan]
    assert ranks == sorted(ranks, reverse=True)
    found = done.step_condition
    assert found is not None and found.policy == "RankSchedule"
    assert 0.0 < found.alpha_min <= found.least <= 1.0
    assert found.step_declared <= found.step_schedule, "what is known afterwards allows a larger step"


def test_the_record_of_plans_and_of_their_condition_does_not_depend_on_what_is_logged_or_on_a_resume(
    tier_file: Path, tmp_path: Path
) -> None:
    every = train(resolve(load(tier_file), "digits", "schedule", 0, ["train.log_every=1"]), tmp_path / "every")
    seldom = ["train.log_every=4", "train.checkpoint_every=2"]

    def stop(what: str, done: int, of: int) -> None:
        if what == "steps" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(resolve(load(tier_file), "digits", "schedule", 0, seldom), tmp_path / "seldom", progress=stop)
    again = train(resolve(load(tier_file), "digits", "schedule", 0, seldom), tmp_path / "seldom", resume=True)
    assert again.resumed == [2]
    assert [step.step for step in every.plan] == [step.step for step in again.plan]
    assert again.step_condition is not None and every.step_condition is not None
    assert again.step_condition.alpha_min == every.step_condition.alpha_min


def test_a_run_without_a_policy_has_no_condition(tier_file: Path, tmp_path: Path) -> None:
    assert train(resolve(load(tier_file), "digits", "mango", 0), tmp_path).step_condition is None

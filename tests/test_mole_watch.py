"""Diagnostics, comparisons, health checks and checkpoints of converted layers."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from test_mole import gpt, loss
from torch import Tensor, nn

from mango.errors import ConfigError, NonFinite, Unhealthy
from mango.mole import MoleConfig, MoleOptimizer, convert, state
from mango.mole.watch import Row
from mango.telemetry import MemoryLedger, RunLog

PERIOD = 3
NAMED = {
    "energy_capture",
    "gradient_norm_compression_ratio",
    "subspace_quality",
    "trust_scaling_factor",
    "condition_number",
    "layer_memory_usage",
    "memory_saved_mb",
}


def train(model: nn.Module, steps: int) -> list[Tensor]:
    optimizer = MoleOptimizer(model.named_parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def watched(**dials: object) -> tuple[nn.Module, list[Row]]:
    model, rows = gpt(), []
    convert(model, MoleConfig(**{"targets": "all", "rank": 8, "diagnostics_every": PERIOD, **dials})).observe(rows.append)
    return model, rows


def test_every_diagnostic_is_there_for_every_layer_and_period() -> None:
    model, rows = watched(gradient="factored")
    train(model, 2 * PERIOD)
    layers = state.layers(model)
    assert [(row["layer"], row["step"]) for row in rows if row["step"] == PERIOD] != []
    assert {(row["layer"], row["step"]) for row in rows} == {(layer.name, step) for layer in layers for step in (PERIOD, 2 * PERIOD)}
    for row in rows:
        assert row.keys() >= NAMED
        assert 0.0 < row["energy_capture"] <= 1.0 and 0.0 <= row["subspace_quality"] <= 1.0
        assert row["condition_number"] >= 1.0 and row["trust_scaling_factor"] >= 1.0 and row["trust_scaling_error"] >= 0.0
        assert row["gradient_norm_compression_ratio"] == pytest.approx(row["energy_capture"] ** 0.5, rel=0.01)


def test_rows_go_to_a_run_log(tmp_path: Path) -> None:
    model = gpt()
    report = convert(model, MoleConfig(store="sketch", rank=8, targets="attention", diagnostics_every=1))
    with RunLog(tmp_path / "metrics.jsonl") as log:
        report.observe(log.write)
        train(model, 2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(report.layers) and all(row["energy_capture"] is None for row in rows)
    copy.deepcopy(model)  # the log is not copied with it


def test_the_memory_of_the_layers_is_what_autograd_keeps() -> None:
    """The layers' own count against the ledger's: they are all that differs between keeping nothing and keeping codes."""
    model, rows = watched(store="int2", targets="ffn", diagnostics_every=1, norms=False)
    ledger = MemoryLedger(model)
    with ledger.activations():
        found = loss(model)
    found.backward()
    kept = sum(row["layer_memory_usage"] for row in rows)
    for layer in state.layers(model):
        layer.config = MoleConfig(store="int4", targets="ffn", diagnostics_every=1)
    rows.clear()
    other = MemoryLedger(model)
    with other.activations():
        found = loss(model)
    found.backward()
    assert sum(row["layer_memory_usage"] for row in rows) - kept == other.saved_activations - ledger.saved_activations > 0
    tokens, width, hidden, mlps = 2 * 23, 64, 256, 2
    assert sum(row["memory_saved_mb"] * 2**20 + row["layer_memory_usage"] for row in rows) == mlps * tokens * (width + 2 * hidden) * 4


@pytest.mark.parametrize("gradient", ["formed", "factored"])
def test_a_comparison_does_not_touch_training_and_sees_the_truth(gradient: str) -> None:
    ends = []
    for every in (0, 2):
        model, rows = watched(gradient=gradient, store="dense", diagnostics_every=every, shadow_every=every, shadow=r"blocks\.1")
        torch.manual_seed(0)
        ends.append(train(model, 4))
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))
    compared = [row for row in rows if "shadow_cosine" in row]
    assert compared and {row["step"] for row in compared} == {2, 4} and all("blocks.1" in row["layer"] for row in compared)
    for row in compared:
        if gradient == "formed":
            assert row["shadow_cosine"] == pytest.approx(1.0, abs=1e-4) and row["shadow_norm_ratio"] == pytest.approx(1.0, abs=1e-4)
        else:
            assert row["shadow_cosine"] == pytest.approx(row["shadow_norm_ratio"], abs=1e-3), "a projection"
            assert row["shadow_cosine"] ** 2 == pytest.approx(row["energy_capture"], abs=0.15), "Hutchinson's estimate"
        assert row["shadow_spectrum"][0] == pytest.approx(row["spectrum"][0], rel=0.35)


def test_codes_are_compared_too() -> None:
    model, rows = watched(store="int2", shadow_every=1, diagnostics_every=0, norms=False)
    train(model, 1)
    assert all(0.5 < row["shadow_cosine"] < 0.9999 for row in rows) and len(rows) == len(state.layers(model))


# faults


def zero(basis: Tensor) -> None:
    basis.zero_()


def duplicate(basis: Tensor) -> None:
    basis[:, 3] = basis[:, 1]


@pytest.mark.parametrize("store", ["dense", "sketch"])
@pytest.mark.parametrize(
    ("inject", "words"), [(zero, "8 of 8 columns of its basis have collapsed"), (duplicate, "columns 1 and 3 .* dependent")]
)
def test_a_damaged_basis_is_named_or_repaired(store: str, inject, words: str) -> None:  # type: ignore[no-untyped-def]
    for health in ("stop", "repair"):
        model, rows = watched(gradient="factored", store=store, health=health, scouts=0)
        train(model, PERIOD + 1)
        rows.clear()
        layer = state.layers(model)[4]
        assert layer.held is not None and layer.held.basis is not None
        inject(layer.held.basis)
        held = layer.held.basis
        if health == "stop":
            layer.steps = 2 * PERIOD - 1  # a power step in between would replace the basis
            with pytest.raises(Unhealthy, match=rf"{layer.name} at step {2 * PERIOD}: {words}"):
                train(model, 1)
        else:
            layer.steps = 2 * PERIOD - 1
            train(model, 1)
            faults = [row for row in rows if "faults" in row]
            assert [row["layer"] for row in faults] == [layer.name] and re.search(words, faults[0]["faults"][0])
            train(model, 1)
            basis = layer.held.basis
            assert basis is not held and torch.allclose(basis.mT @ basis, torch.eye(8), atol=1e-4)


@pytest.mark.parametrize("gradient", ["formed", "factored"])
def test_output_gradients_that_are_not_finite_are_named(gradient: str) -> None:
    model, _ = watched(gradient=gradient)
    train(model, PERIOD - 1)
    layer = model.blocks[1].attention.out
    layer.register_full_backward_pre_hook(lambda _, grads: (grads[0] * float("nan"),))
    with pytest.raises(NonFinite, match=rf"the output gradients of blocks\.1\.attention\.out hold NaN or infinity at step {PERIOD}"):
        train(model, 1)


@pytest.mark.parametrize("store", ["dense", "int4", "sketch"])
@pytest.mark.parametrize("gradient", ["formed", "factored"])
def test_a_gradient_that_vanishes_is_named(gradient: str, store: str) -> None:
    model, _ = watched(gradient=gradient, store=store)
    train(model, 2)
    layer = model.blocks[0].attention.value
    layer.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 0.0,))
    with pytest.raises(Unhealthy, match=rf"blocks\.0\.attention\.value at step {PERIOD}: its gradient vanishes"):
        train(model, PERIOD)


def test_an_output_that_starts_at_zero_is_no_fault() -> None:
    model, rows = watched(diagnostics_every=1)
    torch.nn.init.zeros_(model.blocks[0].feedforward.down.weight)
    train(model, 2)
    assert rows and not any("faults" in row for row in rows)


def test_a_basis_that_captures_too_little_is_named() -> None:
    model, _ = watched(gradient="factored", rank=1, min_energy=0.99)
    with pytest.raises(Unhealthy, match=r"captures 0\.\d+ of the gradient, less than min_energy = 0\.99"):
        train(model, PERIOD)


# checkpoints


@pytest.mark.parametrize("dials", [{"gradient": "factored"}, {"store": "sketch"}, {"gradient": "factored", "residual": "carried"}])
def test_a_saved_state_goes_on_exactly(dials: dict[str, object], tmp_path: Path) -> None:
    model, _ = watched(diagnostics_every=0, **dials)
    train(model, 2)
    torch.save({"model": model.state_dict(), "mole": state.state_dict(model)}, tmp_path / "checkpoint.pt")
    torch.manual_seed(5)
    expected = train(model, 2)
    other, _ = watched(diagnostics_every=0, **dials)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    state.load_state_dict(other, saved["mole"])
    torch.manual_seed(5)
    assert all(torch.equal(one, two) for one, two in zip(train(other, 2), expected, strict=True))


@pytest.mark.parametrize("rank", [4, 8, 20])
@pytest.mark.parametrize("dials", [{"gradient": "factored"}, {"store": "sketch"}, {"store": "int4"}])
def test_a_state_is_taken_up_by_another_rank_and_store(dials: dict[str, object], rank: int) -> None:
    model, _ = watched(diagnostics_every=0, gradient="factored")
    train(model, 2)
    saved = state.state_dict(model)
    other, _ = watched(diagnostics_every=0, **{**dials, "rank": rank})
    state.load_state_dict(other, saved)
    for layer in state.layers(other):
        assert layer.steps == 2
        if layer.tracked is not None:
            basis, before = layer.tracked.basis, saved[layer.name]["basis"]
            assert basis is not None and torch.allclose(basis.mT @ basis, torch.eye(rank), atol=1e-5)
            least = min(rank, 8)
            assert torch.allclose(basis[:, :least].abs(), before[:, :least].abs(), atol=1e-5)
    train(other, 1)


def test_a_state_of_another_model_is_refused() -> None:
    model, _ = watched(diagnostics_every=0, gradient="factored")
    train(model, 1)
    saved = state.state_dict(model)
    other = gpt(width=128)
    convert(other, MoleConfig(targets="all", gradient="factored"))
    with pytest.raises(ConfigError, match=r"state of .*, basis = .* is not legal: a tensor of 128 rows"):
        state.load_state_dict(other, saved)

"""Telemetry: bytes against hand counts, phases of a clock, metrics that are whole lines or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas
import pytest
import torch
from torch import Tensor, nn

from mango import Mango
from mango.optim import build, state_nbytes
from mango.telemetry import Clock, MemoryLedger, RunLog

ROOT = Path(__file__).resolve().parents[1]


# memory


def test_parameters_gradients_and_buffers_are_counted_once_each() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 10, bias=False))
    model[2].weight = nn.Parameter(model[0].weight.detach().T)  # a view of another parameter's storage
    ledger = MemoryLedger(model)
    assert ledger.parameters() == 4 * (200 + 20 + 4 * 20) + 8
    assert ledger.gradients() == 0
    model(torch.randn(4, 10)).sum().backward()
    assert ledger.gradients() == 4 * (200 + 20 + 40 + 200)


def test_saved_activations_of_a_linear_stack_are_its_inputs() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    ledger = MemoryLedger(model)
    with ledger.activations():
        out = model(torch.randn(5, 16))
    assert ledger.saved_activations == 4 * (5 * 16 + 5 * 32)
    out.sum().backward()
    assert ledger._bytes == 0, "the backward pass frees everything"


def test_a_tensor_saved_twice_counts_once_and_relu_shares_its_output() -> None:
    model = nn.Linear(8, 8, bias=False)
    ledger = MemoryLedger(model)
    x = torch.randn(3, 8, requires_grad=True)
    with ledger.activations():
        (x * x + model(x).relu()).sum().backward()
    assert ledger.saved_activations == 4 * (3 * 8 + 3 * 8)  # x, and relu's output


def test_the_peak_is_of_what_is_alive_at_one_time() -> None:
    model = nn.Linear(64, 64, bias=False)
    ledger = MemoryLedger(model)
    with ledger.activations():
        for _ in range(3):
            model(torch.randn(10, 64)).sum().backward()
    assert ledger.saved_activations == 4 * 10 * 64


def test_checkpointed_blocks_keep_their_input_until_they_are_computed_again() -> None:
    block = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32))
    plain, thrifty = MemoryLedger(block), MemoryLedger(block)
    x = torch.randn(6, 32, requires_grad=True)
    with plain.activations():
        block(x)
    with thrifty.activations():
        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    assert plain.saved_activations == 4 * (6 * 32 + 6 * 128)
    assert thrifty.saved_activations < plain.saved_activations


def graphs() -> dict[str, tuple[nn.Module, Tensor, int, dict[str, int]]]:
    """Name -> model, input, bytes that autograd saves, and which module saves how many: all counted by hand."""
    b = 4  # bytes of a float32
    mlp = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
    # each linear layer keeps its input; relu keeps its output, which is the second layer's input
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    # input, the normalisation's input with mean and inverse deviation of each channel, relu's output, the pool's int64 indices (8x4x4 of
    # its output), the linear layer's input
    image, pooled = 2 * 8 * 8 * 8, 2 * 8 * 4 * 4
    norm = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))
    # the layer norm's input, mean and inverse deviation of each row, then the linear layer's input
    embedding = nn.Sequential(nn.Embedding(50, 24), nn.Tanh(), nn.Linear(24, 50, bias=False))
    # int64 indices; tanh keeps its output, the head's input
    return {
        "mlp": (mlp, torch.randn(5, 16), b * (5 * 16 + 5 * 64), {"0": b * 5 * 16, "1": b * 5 * 64}),
        "convolutional": (
            conv,
            torch.randn(2, 3, 8, 8),
            b * (2 * 3 * 64 + image + 2 * 8 + image + pooled) + 8 * pooled,
            {"0": b * 2 * 3 * 64, "1": b * (image + 2 * 8), "2": b * image, "3": 8 * pooled, "5": b * pooled},
        ),
        "normalised": (
            norm,
            torch.randn(6, 32, requires_grad=True),
            b * (6 * 32 + 2 * 6 + 6 * 32),
            {"0": b * (6 * 32 + 2 * 6), "1": b * 6 * 32},
        ),
        "embedding": (embedding, torch.arange(12).view(3, 4), 8 * 12 + b * 12 * 24, {"0": 8 * 12, "1": b * 12 * 24}),
        "residual": (Residual(), torch.randn(7, 16, requires_grad=True), b * 3 * 7 * 16, {"first": b * 7 * 16, "": b * 2 * 7 * 16}),
    }


class Residual(nn.Module):
    """x + second(sigmoid(first(x))): x once, though two branches use it; sigmoid's output and the product's other factor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.first(x).sigmoid()
        return x + self.second(gate) * x


@pytest.mark.parametrize("name", graphs())
def test_five_known_graphs_to_the_byte(name: str) -> None:
    model, x, expected, layers = graphs()[name]
    ledger = MemoryLedger(model)
    with ledger.activations():
        out = model(x)
    assert ledger.saved_by_layer == layers
    assert ledger.saved_activations == expected == sum(layers.values())
    out.sum().backward()
    assert ledger._bytes == 0


def test_a_step_counts_every_category_and_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = build("mango", model, lr=1e-3)
    ledger = MemoryLedger(model, optimizer)
    count = sum(p.numel() for p in model.parameters())
    for batch in (4, 8, 6):
        with ledger.step():
            model(torch.randn(batch, 64)).sum().backward()
            optimizer.step()
    row = ledger.rows[1]
    assert row["parameters"] == row["gradients"] == 4 * count
    assert row["optimizer_state"] == optimizer.nbytes() == state_nbytes(optimizer)
    assert row["saved_activations"] == 4 * (8 * 64 + 8 * 128)
    assert row["rss"] > 10e6
    saved = [4 * batch * (64 + 128) for batch in (4, 8, 6)]
    assert ledger.peaks()["saved_activations"] == max(saved)
    assert ledger.medians()["saved_activations"] == sorted(saved)[1]
    layers = ledger.layers()
    assert {key: sum(layer[key] for layer in layers.values()) for key in ("parameters", "gradients", "optimizer_state")} == {
        key: row[key] for key in ("parameters", "gradients", "optimizer_state")
    }
    assert layers["0"]["saved_activations"] == 4 * 8 * 64
    ledger.write_csv(tmp_path / "memory.csv")
    frame = pandas.read_csv(tmp_path / "memory.csv", index_col="category")
    assert frame.loc["saved_activations"].to_dict() == {"peak": max(saved), "median": sorted(saved)[1]}
    assert 0.0 < ledger.seconds < 1.0


def test_states_of_a_chain_are_counted_by_layer() -> None:
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Flatten(), nn.Linear(64, 64))
    optimizer = build("muon", model, lr=1e-3)
    model(torch.randn(2, 8, 3, 3)).sum().backward()
    optimizer.step()
    ledger = MemoryLedger(model, optimizer)
    assert {name: layer["optimizer_state"] for name, layer in ledger.layers().items()} == {
        "0": 4 * 64 * 72 + 2 * 4 * 64 + 4,
        "2": 4 * 64 * 64 + 2 * 4 * 64 + 4,
    }


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_count_at_their_peak(fused: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    optimizer = Mango(model.parameters(), lr=1e-3, fuse_backward=fused)
    ledger = MemoryLedger(model, optimizer)
    with ledger.activations():
        model(torch.ones(2, 8)).square().sum().backward()
    assert ledger.peak_gradients == 4 * (8 * 32 if fused else 8 * 32 + 32 * 4)
    assert ledger.gradients() == (0 if fused else ledger.peak_gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_ledger_agrees_with_the_device_allocator() -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))).cuda()
    ledger = MemoryLedger(model)
    before = torch.cuda.memory_allocated()
    with ledger.step():
        out = model(torch.randn(512, 1024, device="cuda"))
        after = torch.cuda.memory_allocated()
    assert ledger.rows[0]["saved_activations"] == pytest.approx(after - before - out.nbytes, rel=0.01)
    assert ledger.rows[0]["parameters"] == pytest.approx(before, rel=0.01)


# time


def test_the_clock_adds_up_phases_nested_and_after_an_error() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("step"), clock("forward"):
            time.sleep(0.02)
    with pytest.raises(ValueError), clock("step"):
        raise ValueError
    assert clock.counts == {"step": 3, "forward": 2}
    assert 0.04 <= clock.seconds["forward"] <= clock.seconds["step"]


def test_the_clock_waits_for_the_device_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    for clock in (Clock("cuda"), Clock("cpu", sync=True)):
        with clock("step"):
            pass
    assert waits == []
    with Clock("cuda", sync=True)("step"):
        pass
    assert len(waits) == 2


# metrics


def test_lines_are_whole_or_absent_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = """
        import resource, signal, sys
        from pathlib import Path
        from mango.telemetry.runlog import RunLog
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # stands in for a disk with 100 bytes left
        log = RunLog(Path(sys.argv[1]))
        log.write({"step": 1, "pad": "x" * 40})
        try:
            log.write({"step": 2, "pad": "x" * 60})
        except OSError as error:
            assert error.filename == sys.argv[1], error
            sys.exit(3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert done.returncode == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunLog(path) as log:
        log.write({"step": 1})
        kept = list(log.lines)
        log.write({"step": 2})
    with RunLog(path, kept) as log:
        log.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_number_that_json_does_not_know_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="JSON"):
        log.write({"loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == ""

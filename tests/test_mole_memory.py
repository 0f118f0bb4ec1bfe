"""The bytes that converted layers save, and the gradients that are alive at one time."""

from __future__ import annotations

import pytest
import torch
from test_mole import gpt, loss, saved_bytes
from torch import Tensor, nn

from mango import Mango
from mango.models.gpt import Block, positions
from mango.mole import MoleConfig, convert
from mango.telemetry import MemoryLedger


@pytest.mark.parametrize(("store", "bar"), [("int2", 1 / 6), ("int4", 0.3), ("int8", 17 / 32)])
def test_the_code_of_an_input_against_bf16(store: str, bar: float) -> None:
    model = nn.Sequential(nn.Linear(512, 64, bias=False))
    x = torch.randn(1024, 512)
    convert(model, MoleConfig(store=store, targets="all"))
    assert 0 < saved_bytes(model, x) <= bar * x.numel() * 2


@pytest.mark.parametrize(("store", "bar"), [("int2", 0.40), ("int4", 0.50)])
def test_the_bytes_that_a_whole_block_saves(store: str, bar: float) -> None:
    """d8 at 1024 tokens in bfloat16; what autograd saves, each storage once."""

    def block_bytes(config: MoleConfig | None) -> int:
        model = nn.ModuleDict({"block": Block(512, 4, 4)}).bfloat16()
        if config is not None:
            convert(model, config)
        x = torch.randn(1, 1024, 512, dtype=torch.bfloat16, requires_grad=True)
        ledger = MemoryLedger(model)
        with ledger.activations():
            y = model["block"](x, *positions(1024, 128, x))
        assert y.shape == x.shape
        return ledger.saved_activations

    assert block_bytes(MoleConfig(store=store, targets="all")) <= bar * block_bytes(None)


def test_layers_that_read_one_tensor_share_its_code() -> None:
    class Fan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(128, 128, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) + self.key(x) + self.value(x)

    model, x = Fan(), torch.randn(64, 128)
    convert(model, MoleConfig(store="int4", targets="all"))
    one = int(64 * 128 * 0.5625)
    assert saved_bytes(model, x) == one
    assert model.query.mole.shared.get(x, ()) is None
    with torch.no_grad():
        x.mul_(2.0)  # changed in place: not the tensor that was encoded
    before = model.query(x)
    x.data = torch.randn(64, 128)
    del before
    assert saved_bytes(model, x) == one


def test_one_gradient_is_alive_at_a_time_with_a_fused_step() -> None:
    model = gpt()
    convert(model, MoleConfig(targets="attention"))
    optimizer = Mango(model.named_parameters(), lr=1e-3, fuse_backward=True)
    alive: list[int] = []
    matrices = [p for name, p in model.named_parameters() if "attention" in name]
    for p in matrices:
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in matrices)))
    loss(model).backward()
    optimizer.step()
    assert len(alive) == len(matrices) and max(alive) <= 1


def test_without_gradients_nothing_is_encoded() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    convert(model, MoleConfig(targets="all"))
    x = torch.randn(4, 64, requires_grad=True)
    with torch.no_grad():
        model(x)
    assert model[0].mole.shared._input is None
    model.requires_grad_(False)
    assert saved_bytes(model, x) == 0

"""Every store and every way to make a gradient against one contract, models that are not ours, and sequences of any length."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mango import Mango, bench
from mango.bench import mole as mole_bench
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.mole import MoleConfig, MoleLinear, convert, revert
from mango.mole.config import STORES
from mango.mole.factors import take
from mango.mole.gradients import REGISTRY
from mango.telemetry import MemoryLedger

EVERY = list(product(STORES, REGISTRY))
UNBIASED = ("int4", "int2")
ERROR = {"dense": 1e-5, "bf16": 5e-3, "int8": 2e-2, "nf4": 0.15, "int4": 0.15, "int2": 0.9, "sketch": 1e-5}  # of a layer's gradient


def layer(inputs: int = 64, outputs: int = 48, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs, bias=bias))


def dials(store: str, gradient: str) -> MoleConfig:
    """With a rank that is the whole space, so that only the store can cost exactness."""
    return MoleConfig(store=store, gradient=gradient, rank=4096, targets="all")


def gradient_of(model: nn.Sequential, x: Tensor, b: Tensor) -> Tensor:
    (model(x) * b).sum().backward()
    factors, weight = take(model[0].weight), model[0].weight
    found = weight.grad if factors is None else factors.product()
    weight.grad = None
    assert found is not None
    return found


def every(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize(("store", "gradient"), EVERY)(function)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_input_gradient_are_exact_and_the_weights_is_within_the_stores_error(
    store: str, gradient: str, dtype: torch.dtype
) -> None:
    model = layer().to(dtype)
    x, b = gaussian((40, 64), (1,)).to(dtype).requires_grad_(), gaussian((40, 48), (2,)).to(dtype)
    y = model(x)
    y.backward(b)
    expected, dx, db = model[0].weight.grad.clone(), x.grad.clone(), model[0].bias.grad.clone()
    model.zero_grad()
    x.grad = None
    convert(model, dials(store, gradient))
    found = gradient_of(model, x, b)
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.equal(model(x), y)
    for one, two in ((x.grad, dx), (model[0].bias.grad, db)):
        assert float((one - two).float().norm()) <= rounding * float(two.float().norm())
    assert float((found - expected).float().norm()) <= max(ERROR[store], rounding) * float(expected.float().norm())


@every
def test_unbiased_stores_give_unbiased_gradients_and_others_the_same_each_time(store: str, gradient: str) -> None:
    model, b, draws = layer(bias=False), gaussian((40, 48), (2,)), 300
    x = gaussian((40, 64), (1,))
    expected = b.mT @ x
    convert(model, dials(store, gradient))
    axes = torch.stack([expected.flatten(), expected.sign().flatten(), *gaussian((6, expected.numel()), (3,))])
    errors = torch.stack([axes @ (gradient_of(model, x, b) - expected).flatten() for _ in range(draws if store in UNBIASED else 2)])
    if store in UNBIASED:
        assert float((errors.mean(0) / (errors.std(0) / draws**0.5)).abs().max()) < 5.0
    else:
        assert torch.allclose(errors[0], errors[1], rtol=1e-3, atol=1e-2)


@every
def test_accumulated_micro_batches_are_the_whole_batch(store: str, gradient: str) -> None:
    model, x, b = layer(bias=False), gaussian((40, 64), (1,)), gaussian((40, 48), (2,))
    convert(model, dials(store, gradient))
    for place in (slice(20), slice(20, 40)):
        (model(x[place]) * b[place]).sum().backward()
    factors = take(model[0].weight)
    found = model[0].weight.grad if factors is None else factors.product()
    expected = b.mT @ x
    assert float((found - expected).norm()) <= max(ERROR[store], 1e-5) * float(expected.norm())


@every
def test_converted_and_reverted_it_is_the_model(store: str, gradient: str) -> None:
    model, x = layer(), gaussian((4, 64), (1,))
    original, params, y = model[0], list(model.parameters()), model(x)
    convert(model, dials(store, gradient))
    assert isinstance(model[0], MoleLinear) and torch.equal(model(x), y)
    revert(model)
    assert model[0] is original and torch.equal(model(x), y)
    assert all(one is two for one, two in zip(model.parameters(), params, strict=True))


@every
def test_what_is_saved_is_seen_by_the_ledger(store: str, gradient: str) -> None:
    model, x = layer(512, 64, bias=False), gaussian((1024, 512), (1,))
    convert(model, MoleConfig(store=store, gradient=gradient, rank=32, targets="all"))
    ledger = MemoryLedger(model)
    with ledger.activations():
        y = model(x)
    values = x.numel()
    expected = {
        "dense": 4 * values,
        "bf16": 2 * values,
        "int8": values + values // 16,
        "nf4": values // 2 + values // 16,
        "int4": values // 2 + values // 16,
        "int2": values // 4 + values // 16,
        "sketch": 4 * 32 * (1024 + 512),
    }
    assert ledger.saved_activations == expected[store] == model[0].mole.kept
    del y


# sequences of any length


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that still exist, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in known | self.sizes.keys():
                storage = leaf.untyped_storage()
                self.sizes[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage))
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@contextmanager
def counting() -> Iterator[Live]:
    with Live() as live:
        yield live


class Relu2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.relu(self.up(x)).square())


def streamed(tokens: int, chunk: int | None, seed: int = 0) -> tuple[int, dict[str, Tensor]]:
    """Peak bytes beyond the input's code, the output and the gradients in and out; and the gradients."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": Relu2()})
    convert(model, MoleConfig(store="int4", hidden="recompute", chunk=chunk))
    x, dy = gaussian((1, tokens, 64), (1,)).requires_grad_(), gaussian((1, tokens, 64), (2,))
    torch.manual_seed(seed)
    with counting() as live:
        y = model["mlp"](x)
        y.backward(dy)
    code = tokens * 64 * 9 // 16
    beyond = live.peak - code - 2 * tokens * 64 * 4  # y and dx; dy and x were there before
    return beyond, {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def test_a_stream_of_tokens_needs_the_same_whatever_its_length() -> None:
    short, long = streamed(1024, 256)[0], streamed(16384, 256)[0]
    assert 0 < long <= 1.05 * short
    assert streamed(4096, None)[0] > 2 * streamed(1024, None)[0], "without chunks it grows, so the count can see it"


def test_a_stream_has_the_loss_and_the_gradients_of_the_whole() -> None:
    whole, chunked = streamed(1024, None)[1], streamed(1024, 256)[1]
    assert torch.allclose(whole["y"], chunked["y"], atol=1e-5)
    torch.manual_seed(0)
    for tokens, chunk in ((1000, 256), (1000, 1), (1000, 5000)):  # exact stores, any chunk
        found = []
        for size in (None, chunk):
            torch.manual_seed(0)
            model = nn.ModuleDict({"mlp": Relu2()})
            convert(model, MoleConfig(store="dense", hidden="recompute", chunk=size))
            x = gaussian((1, tokens, 64), (1,)).requires_grad_()
            (model["mlp"](x) * gaussian((1, tokens, 64), (2,))).sum().backward()
            found.append([x.grad, *(p.grad for p in model.parameters())])
        for one, two in zip(*found, strict=True):
            assert float((one - two).norm()) <= 1e-5 * float(two.norm())


# one gradient at a time


class SwiGLU(nn.Module):
    def __init__(self, width: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(width, 3 * width, bias=False), linear(width, 3 * width, bias=False)
        self.down_proj = linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("mlp", [Relu2, lambda: SwiGLU(64)])
@pytest.mark.parametrize("hidden", ["codes", "recompute"])
@pytest.mark.parametrize(("chunk", "alive"), [(None, 1), (2, None)])
def test_one_gradient_of_an_mlp_is_alive_at_a_time(mlp: Callable[[], nn.Module], hidden: str, chunk: int | None, alive: int | None) -> None:
    """With few tokens nothing but gradients is large. The sums over chunks are there for all weights, as MoleMLP says."""
    model = nn.ModuleDict({"mlp": mlp()})
    convert(model, MoleConfig(hidden=hidden, chunk=chunk))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    largest = max(p.nbytes for p in matrices)
    y = model["mlp"](gaussian((4, 64), (1,)).requires_grad_())
    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in matrices]  # as a fused step does
    with counting() as live:
        y.sum().backward()
    assert (alive or len(matrices)) * largest <= live.peak < ((alive or len(matrices)) + 0.4) * largest
    for hook in hooks:
        hook.remove()
    optimizer, ledger = Mango(model.parameters(), lr=1e-3, fuse_backward=True), MemoryLedger(model)
    with ledger.activations():
        model["mlp"](gaussian((4, 64), (1,))).sum().backward()
    optimizer.step()
    assert ledger.peak_gradients == largest and ledger.gradients() == 0


def test_bench_rows() -> None:
    rows = bench.REGISTRY.load("mole")(width=128, tokens=64, depth=1, repeats=1, warmup=0)
    assert [row["name"] for row in rows] == list(mole_bench.CANDIDATES)
    by_name = {row["name"]: row for row in rows}
    assert by_name["dense"]["ratio"] == by_name["dense"]["saved_ratio"] == 1.0
    assert by_name["int2"]["saved_mib"] < by_name["int4"]["saved_mib"] < by_name["int8"]["saved_mib"] < by_name["dense"]["saved_mib"]
    with pytest.raises(ConfigError, match="width = 100 is not legal: a multiple of 128"):
        mole_bench.run(width=100)
    with pytest.raises(ConfigError, match="names = 'int3' is not legal: one of dense"):
        mole_bench.run(names=["int3"])
    with pytest.raises(ConfigError, match="depth = 0 is not legal: an integer >= 1"):
        mole_bench.run(depth=0)

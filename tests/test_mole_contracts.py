"""Every store and every way to make a gradient against one contract, models that are not ours, and sequences of any length."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mango import Mango, bench
from mango.bench import mole as mole_bench
from mango.compat import require, transformers
from mango.errors import ConfigError
from mango.mole import MoleConfig, MoleLinear, MoleOptimizer, convert, revert
from mango.mole.config import STORES
from mango.mole.factors import take
from mango.mole.gradients import REGISTRY
from mango.subspace import gaussian
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


# GPTs that are not ours


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, width: int, fused: bool, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.fused, self.heads = fused, 4
        if fused:
            self.c_attn = linear(width, 3 * width, bias=False)
        else:
            self.q_proj, self.k_proj, self.v_proj = (linear(width, width, bias=False) for _ in range(3))
        self.c_proj = linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.c_proj(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class ForeignBlock(nn.Module):
    def __init__(self, width: int, fused: bool, gated: bool, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attn = Attention(width, fused, linear)
        plain = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width))
        self.mlp = SwiGLU(width, linear) if gated else plain

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ForeignGPT(nn.Module):
    def __init__(self, fused: bool = False, gated: bool = False, tied: bool = False, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(32, 64), nn.Embedding(32, 64)
        self.h = nn.ModuleList(ForeignBlock(64, fused, gated, linear) for _ in range(2))
        self.lm_head = nn.Linear(64, 32, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.1 if tied else 0.02)
        if tied:
            self.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


def lora() -> nn.Module:
    transformers("LoRA")  # which peft imports
    peft = require("peft", extra="llama", purpose="LoRA")
    torch.manual_seed(0)
    model = ForeignGPT()
    config = peft.LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "v_proj", "mlp.0", "mlp.2"], modules_to_save=["lm_head", "wte"])
    return peft.get_peft_model(model, config)


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "own linear": lambda: ForeignGPT(linear=OwnLinear),
    "tied": lambda: ForeignGPT(tied=True),
    "fused qkv": lambda: ForeignGPT(fused=True),
    "gated": lambda: ForeignGPT(gated=True),
    "lora": lora,
}


def trained(model: nn.Module, steps: int = 200, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> float:
    """Mean loss of the last steps on a language in which seven tokens of ten follow from the one before."""
    table = torch.randint(32, (32,), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    stepper = optimizer([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(32, (16, 13), generator=generator)
        certain = torch.rand(16, 13, generator=generator) < 0.7
        for place in range(1, 13):
            tokens[:, place] = torch.where(certain[:, place], table[tokens[:, place - 1]], tokens[:, place])
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


LONGER = ("tied", "gated", "lora")  # twice two hundred steps each


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONGER else []) for name in FOREIGN])
def test_a_foreign_gpt_trains_as_it_did(name: str) -> None:
    torch.manual_seed(0)
    model = FOREIGN[name]()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    expected = trained(model)
    assert expected < 2.4, "far below the 3.47 of knowing nothing, so that two percent of it mean something"
    model.load_state_dict(start)
    report = convert(model, MoleConfig(store="int4", targets="all"))
    assert report.converted
    torch.manual_seed(0)
    found = trained(model)
    assert abs(found - expected) <= 0.02 * expected
    revert(model)
    assert model.state_dict().keys() == start.keys()


def test_what_becomes_of_lora() -> None:
    report = convert(lora(), MoleConfig(targets="all"))
    adapters = [name for name in report.converted if "lora_" in name]
    assert adapters and all("lora_A" in name or "lora_B" in name for name in adapters)
    frozen = {name: why for name, why in report.skipped.items() if "base_layer" in name}
    assert frozen and all(why.startswith("its weight is frozen") for why in frozen.values())


def test_what_becomes_of_tied_weights_and_conv1d() -> None:
    model = ForeignGPT(tied=True)
    assert "lm_head" in convert(model, MoleConfig(targets="all")).converted
    revert(model)
    report = convert(model, MoleConfig(targets="all", gradient="factored"))
    assert report.skipped["lm_head"] == "its weight is that of wte too, whose gradient is formed: factored gradients need fill_grad"
    revert(model)
    assert "lm_head" in convert(model, MoleConfig(targets="all", gradient="factored", fill_grad=True)).converted
    conv1d = transformers("Conv1D").pytorch_utils.Conv1D(192, 64)
    report = convert(nn.ModuleDict({"c_attn": conv1d, "c_proj": nn.Linear(64, 64)}), MoleConfig(targets="all"))
    assert report.skipped["c_attn"] == "Conv1D is not an nn.Linear"


def test_the_optimizer_of_factors_trains_a_foreign_gpt() -> None:
    torch.manual_seed(0)
    model = ForeignGPT(fused=True)
    convert(model, MoleConfig(gradient="factored", rank=16, targets="all"))
    assert trained(model, optimizer=MoleOptimizer) < 2.4


# with the rest of torch


def test_data_parallel_training_reduces_formed_gradients(tmp_path: Path) -> None:
    """One process is enough to see that the hooks of DDP find each gradient."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model, tokens = ForeignGPT(), torch.randint(32, (2, 12))
        model(tokens).square().mean().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        convert(model, MoleConfig(store="dense", targets="all"))
        nn.parallel.DistributedDataParallel(model)(tokens).square().mean().backward()
        for p, grad in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None and float((p.grad - grad).norm()) <= 1e-5 * float(grad.norm())
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow  # the compiler takes a minute
def test_a_compiled_model_has_the_same_gradients() -> None:
    """Drawing and packing codes stays outside of the graphs, so they break there; what is computed does not change."""
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"mlp": Relu2(), "attn": nn.Linear(64, 64)}), gaussian((8, 64), (1,))
    convert(model, MoleConfig(store="dense", targets="all"))

    def forward(x: Tensor) -> Tensor:
        return model["attn"](model["mlp"](x).tanh()).square().mean()

    forward(x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(forward, backend="eager")(x).backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None and float((p.grad - grad).norm()) <= 1e-5 * float(grad.norm())


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

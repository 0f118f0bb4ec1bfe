"""The planner against what real models and real optimizers hold, to the byte where that is promised."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mango import LayerPlan, Mango, codecs, optim
from mango.compat import transformers
from mango.errors import ConfigError
from mango.models.gpt import GPT
from mango.mole import MoleConfig, convert, revert
from mango.optim import muon
from mango.optim.accounting import layer_nbytes, state_nbytes, state_tensors
from mango.planner import GPUS, Target, methods, plan
from mango.planner.growth import Growth
from mango.planner.report import DTYPES
from mango.planner.targets import causal
from mango.planner.trace import Trace, Watch, trace
from mango.telemetry.memory import MemoryLedger


class Mixed(nn.Module):
    """An embedding, a wide and a tall matrix, a convolution, vectors, a small matrix, a scalar and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.wide, self.tall = nn.Linear(64, 130), nn.Linear(130, 48)
        self.convolution = nn.Conv2d(24, 32, 3)
        self.small, self.scalar = nn.Linear(8, 8), nn.Parameter(torch.zeros(()))
        self.frozen = nn.Linear(64, 64).requires_grad_(False)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in model.named_parameters() if param.requires_grad}


def fill_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.randn_like(param) if param.requires_grad else None


def held(work: Callable[[], Any], existing: list[Tensor]) -> int:
    """The most bytes that real work holds at one time beside what existed."""
    watch = Watch()
    for tensor in existing:
        watch.ignore(tensor)
    with watch:
        work()
    return max((sample[0] for sample in watch.samples), default=0)


# ---------------------------------------------------------------- optimizer state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exclude", [(), ("embedding",)])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "adamw8bit", "galore", "galore8bit", "mango"])
def test_state_is_exact_for_a_real_optimizer_after_a_step(name: str, exclude: tuple[str, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Mixed().to(dtype)
    built = optim.build(name, model, lr=1e-3, exclude=exclude)
    if name in ("galore", "galore8bit") and dtype == torch.bfloat16:
        model = model.float()  # the CPU has no bfloat16 for some of its products; sizes scale with the dtype
        built = optim.build(name, model, lr=1e-3, exclude=exclude)
    fill_gradients(model)
    built.step()
    kind = next(model.parameters()).dtype
    assert methods.state_nbytes(name, shapes(model), kind, exclude) == state_nbytes(built)
    if isinstance(built, Mango):
        assert built.nbytes() == state_nbytes(built)


@pytest.mark.parametrize("codec", list(codecs.REGISTRY))
@pytest.mark.parametrize("error", ["none", "gradient", "codec"])
def test_mangos_state_is_exact_for_every_codec_and_awkward_shapes(codec: str, error: str) -> None:
    chosen = LayerPlan(rank=3, basis_codec=codec, moment_codec=codec, error_codec=codec, error=error)
    for shape in ((64, 65), (33, 7, 5, 5), (4099, 3)):
        param = nn.Parameter(torch.randn(shape))
        param.grad = torch.randn(shape)
        built = Mango([param], plan=chosen)
        built.step()
        assert layer_nbytes(shape, chosen) == built.nbytes()


def test_small_tensors_keep_plain_adamw() -> None:
    for shape in ((), (5000,), (63, 65)):
        param = nn.Parameter(torch.randn(shape))
        param.grad = torch.randn(shape)
        built = Mango([param])
        built.step()
        assert layer_nbytes(shape, LayerPlan()) == built.nbytes() == 8 * prod(shape)


def test_unknown_optimizers_and_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer = 'sgd'"):
        methods.state_nbytes("sgd", {})
    with pytest.raises(ConfigError, match=r"method = 'sgd' is not legal: one of adamw-fp32"):
        methods.method("sgd")


# ---------------------------------------------------------------- the step's workspace


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_workspace_of_a_step_is_what_a_real_step_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real step on the CPU under the same watch, with foreach and in bfloat16 as on a card; to within 5 %."""
    monkeypatch.setattr(muon, "bfloat16_units", lambda device: True)
    model = nn.Sequential(nn.Linear(256, 128, bias=False), nn.Linear(128, 512, bias=False))
    fill_gradients(model)
    built = optim.build(name, model, lr=1e-3, **({"foreach": True} if name == "adafactor" else {}))
    built.step()
    kept = [tensor for param in model.parameters() for tensor in (param, param.grad)]
    real = held(lambda: built.step(), [*kept, *state_tensors(built)])
    computed = methods.scratch_nbytes(name, shapes(model), torch.float32, (), 1 / 8, LayerPlan(), fused=False)
    assert computed == pytest.approx(real, rel=0.05, abs=64 * 4)  # a few norms and scalars


def test_a_fused_step_holds_one_layer_at_a_time() -> None:
    many = {f"layer{i}": (256, 256) for i in range(8)}

    def step(fused: bool) -> int:
        return methods.scratch_nbytes("mango", many, torch.float32, (), 1 / 8, LayerPlan(), fused)

    assert 4 * 256 * 256 <= step(True) < step(False) <= 8 * step(True)


# ---------------------------------------------------------------- the traced passes


def test_trace_of_two_layers_in_closed_form() -> None:
    """y = relu(x A) B: kept are the input's copy, the relu's output (which is also B's input), and nothing else."""
    model = nn.Sequential(nn.Linear(10, 30, bias=False), nn.ReLU(), nn.Linear(30, 20, bias=False))
    found = trace(model, lambda f: f(torch.empty(7, 10, device="meta") * 2).sum())
    assert found.activations == 4 * (7 * 10 + 7 * 30)
    assert found.grads[-1] == 4 * (10 * 30 + 30 * 20)
    assert found.saved[-1] == 0
    assert found.fused_peak() <= found.peak()
    assert found.stepping.sum() == 2


def tiny_llama(heads: int = 4) -> Any:
    library = transformers("a test")
    return library.LlamaConfig(
        vocab_size=999,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=heads,
        use_cache=False,
    )


def next_token(model: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def language_models(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Callable[..., Tensor]]:
    """A real model, the one to trace, and (model, tokens) -> loss."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if kind == "gpt":
            real: nn.Module = GPT(999, depth=3, width=192, heads=3)
            return real, real, next_token
        config = tiny_llama(2 if kind == "grouped" else 4)
        real = transformers("a test").LlamaForCausalLM(config).train()
        return real, causal("tiny", config).module, lambda model, tokens: model(input_ids=tokens, labels=tokens).loss
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt", "llama", "grouped"])
def test_weights_gradients_and_activations_are_the_ledgers(kind: str, dtype: torch.dtype) -> None:
    """Weights and gradients exact; saved activations within 5 % at three sizes, the peak too."""
    real, stand_in, loss = language_models(kind, dtype)
    for batch, length in ((1, 64), (2, 128), (3, 200)):
        real.zero_grad()
        ledger = MemoryLedger(real)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        with ledger.activations():
            loss(real, tokens).backward()
        found = trace(stand_in, lambda f, size=(batch, length): loss(f, torch.empty(size, dtype=torch.long, device="meta")), dtype)
        assert found.grads[-1] == ledger.gradients()
        assert found.activations == pytest.approx(ledger.saved_activations, rel=0.05)
        real.zero_grad()
        passes = held(lambda tokens=tokens: loss(real, tokens).backward(), [tokens, *real.parameters(), *real.buffers()])
        assert found.peak() == pytest.approx(passes, rel=0.05)
    report = plan(target_of(stand_in, loss), seq=32, methods=["adamw"], dtype=next(name for name, kind in DTYPES.items() if kind == dtype))
    assert report.rows[0].weights == ledger.parameters()
    assert report.rows[0].gradients == ledger.gradients()


@pytest.mark.parametrize(("width", "depth"), [(64, 1), (128, 3), (256, 2)])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_saved_activations_are_the_ledgers_at_three_sizes_of_model(kind: str, width: int, depth: int) -> None:
    """To 5 %, and with the linear layers converted to codes of their inputs too, which keep less."""
    if kind == "gpt":
        stand_in = real = GPT(999, depth=depth, width=width, heads=2)
        loss, ends = next_token, ("^embedding", "^head")
    else:
        config = tiny_llama()
        config.hidden_size, config.num_hidden_layers, config.intermediate_size = width, depth, 2 * width
        config.head_dim = width // config.num_attention_heads
        real, stand_in = transformers("a test").LlamaForCausalLM(config).train(), causal("tiny", config).module
        loss, ends = (lambda model, tokens: model(input_ids=tokens, labels=tokens).loss), ("embed", "lm_head")
    planned = Target("tiny", stand_in, target_of(stand_in, loss).loss, ends=ends)
    found = plan(planned, seq=96, batch=2, dtype="fp32", methods=["mango+fused", "mango+fused+int4"])
    assert found.exact
    kept = []
    for row, store in zip(found.rows, (None, "int4"), strict=True):
        if store is not None:
            convert(real, MoleConfig(store=store, targets="all", exclude=ends))
        ledger = MemoryLedger(real)
        with ledger.activations():
            loss(real, torch.zeros(2, 96, dtype=torch.long)).backward()
        if store is not None:
            revert(real)
        kept.append(row.activations)
        assert row.activations == pytest.approx(ledger.saved_activations, rel=0.05)
    assert kept[0] > kept[1]


def test_a_row_that_converts_nothing_is_refused_by_name() -> None:
    assert [row.method for row in plan("resnet50", "rtx3090", batch=4, methods=["adamw"]).rows] == ["adamw"]
    with pytest.raises(ConfigError, match=r"mole\.targets"):
        plan("resnet50", "rtx3090", batch=4, methods=["mango+fused+int4"])


def target_of(module: nn.Module, loss: Callable[..., Tensor]) -> Target:
    return Target("tiny", module, lambda f, batch, size, _: loss(f, torch.empty(batch, size, dtype=torch.long, device="meta")))


def test_attention_on_the_meta_device_keeps_no_square_matrix_and_is_restored() -> None:
    original = F.scaled_dot_product_attention
    length = 512
    q = nn.Parameter(torch.empty(1, 2, length, 16))
    found = trace(nn.ParameterList([q]), lambda f: attend(f, length))
    assert found.activations < 4 * 2 * length * length
    assert F.scaled_dot_product_attention is original
    x = torch.randn(1, 2, 8, 16)
    assert F.scaled_dot_product_attention(x, x, x).shape == x.shape


def attend(_: Any, length: int) -> Tensor:
    q = torch.empty(1, 2, length, 16, device="meta", requires_grad=True)
    return F.scaled_dot_product_attention(q * 1, q * 2, q * 3, is_causal=True).sum()


def test_a_model_is_neither_run_nor_changed() -> None:
    model = GPT(99, depth=1, width=64, heads=2)
    before = {name: (param.data_ptr(), param.dtype) for name, param in model.named_parameters()}
    trace(model, lambda f: next_token(f, torch.empty(1, 8, dtype=torch.long, device="meta")), torch.bfloat16)
    assert {name: (param.data_ptr(), param.dtype) for name, param in model.named_parameters()} == before
    assert all(param.grad is None for param in model.parameters())


def test_a_model_that_reads_values_is_refused() -> None:
    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.sum() > 0) else x

    with pytest.raises(ConfigError, match="model = 'Reads' is not legal: one whose operations do not depend on values"):
        trace(Reads(4, 4), lambda f: f(torch.empty(2, 4, device="meta")).sum())


# ---------------------------------------------------------------- growth


def test_growth_predicts_every_size_to_the_byte() -> None:
    module = causal("tiny", tiny_llama()).module

    def measure(size: int) -> Trace:
        return trace(module, lambda f: f(input_ids=(t := torch.empty(2, size, dtype=torch.long, device="meta")), labels=t).loss)

    growth = Growth(measure, 32)
    assert growth.exact
    for size in (2, 77, 1000):
        found, direct = growth.at(size), measure(size)
        assert all((getattr(found, name) == getattr(direct, name)).all() for name in ("live", "saved", "grads", "stepping"))


def test_growth_that_is_no_polynomial_is_traced_size_by_size() -> None:
    model = nn.Linear(4, 4)

    def measure(size: int) -> Trace:
        padded = -(-size // 24) * 24  # a model that pads
        return trace(model, lambda f: f(torch.empty(padded, 4, device="meta") * 2).square().sum())

    growth = Growth(measure, 16)
    assert not growth.exact
    assert growth.at(100).activations == measure(100).activations
    limit = measure(480).peak()
    assert growth.longest(Trace.peak, limit) == 480
    assert growth.longest(Trace.peak, -1) == 0


def test_a_model_that_works_in_chunks_is_not_extrapolated_from_short_inputs() -> None:
    """Our GPT's head makes 1024 tokens' logits at a time: from there on its workspace stops growing."""
    module = GPT(5000, depth=1, width=64, heads=2)

    def loss(model: Any, batch: int, size: int, dtype: torch.dtype) -> Tensor:
        tokens = torch.empty(batch, size, dtype=torch.long, device="meta")
        return model(tokens, targets=tokens)

    with torch.device("meta"):
        target = Target("streamed", module.to("meta"), loss)

    def row(seq: int) -> Any:
        reserve = GPUS["rtx3090"].nbytes - 120 * 2**20
        return plan(target, "rtx3090", seq=seq, dtype="fp32", methods=["adamw"], reserve=reserve).rows[0]

    short, long = row(1024), row(8192)
    direct = trace(module, lambda model: loss(model, 1, 8192, torch.float32), torch.float32)
    assert long.workspace == direct.temporary() < 1.5 * short.workspace
    assert long.peak == long.weights + long.state + direct.peak()
    assert row(long.longest).fits and not row(long.longest + long.longest // 1000 + 1).fits


def test_heads_that_the_default_plan_leaves_to_adamw_are_planned_so() -> None:
    shapes = {"head": (10, 512), "body": (256, 256)}
    for chosen in (LayerPlan(), LayerPlan(rank=8)):
        params = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
        optimizer = Mango(params, plan=chosen)
        for _, param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert methods.state_nbytes("mango", shapes, plans=chosen) == optimizer.nbytes()
        assert methods.scratch_nbytes("mango", shapes, torch.float32, (), 1 / 8, chosen, fused=True) > 0

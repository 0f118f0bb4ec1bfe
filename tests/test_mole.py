"""MoleGrad's conversion and its exact parts: every model is the model, every gradient that promises to be exact is."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mango import Mango, codecs, models
from mango.errors import ConfigError, NonFinite
from mango.models.gpt import Block, positions
from mango.mole import MoleConfig, MoleLinear, convert, pair, revert
from mango.telemetry import MemoryLedger

EXACT = {"store": "dense", "min_features": 1}
Loss = Callable[[nn.Module], Tensor]


def gpt(width: int = 64, vocabulary: int = 50, depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = models.get("gpt", vocabulary=vocabulary, depth=depth, width=width, heads=4, ffn=4)
    nn.init.normal_(model.head.weight, std=0.1)
    return model


def tokens(vocabulary: int = 50, batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module) -> Tensor:
    data = tokens()
    return functional.cross_entropy(model(data[:, :-1]).flatten(0, 1).float(), data[:, 1:].flatten())


def gradients(model: nn.Module, of: Loss = loss) -> dict[str, Tensor]:
    model.zero_grad()
    of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert float((found[name] - grad).norm()) <= tolerance * float(grad.norm()), name


# what is not legal


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("store", "int3", "one of dense, bf16, int8, nf4, int4, int2, sketch"),
        ("gradient", "none", "one of formed, factored"),
        ("hidden", "no", "one of codes, recompute"),
        ("orthogonalization", "svd", "one of cholesky, qr"),
        ("sketch_basis", "svd", "one of scouts, random"),
        ("residual", "some", "one of none, carried, unbiased"),
        ("health", "hide", "one of off, repair, stop"),
        ("matmul", "int8", "one of auto, fp8"),
        ("derivative_store", "sketch", "null or one of dense, bf16, int8, nf4, int4, int2"),
        ("block", 48, "a power of two from 8 to 65536"),
        ("chunk", 0, "an integer >= 1"),
        ("rank", 0, r"an integer >= 1 or a fraction in \(0, 1\]"),
        ("rank", True, r"an integer >= 1 or a fraction in \(0, 1\]"),
        ("residual_rank", 1.5, r"an integer >= 1 or a fraction in \(0, 1\]"),
        ("min_features", 0, "an integer >= 1"),
        ("power_iters", 0, "an integer >= 1"),
        ("scouts", -1, "an integer >= 0"),
        ("probes", 1, "an integer >= 2"),
        ("diagnostics_every", 1.5, "an integer >= 0"),
        ("shadow_every", -1, "an integer >= 0"),
        ("seed", -1, "an integer >= 0"),
        ("norms", 1, "true or false"),
        ("fill_grad", None, "true or false"),
        ("trust_scaling", "yes", "true or false"),
        ("warm_start_decay", 1.0, r"a number in \[0, 1\)"),
        ("min_energy", -0.1, r"a number in \[0, 1\)"),
        ("energy_target", 1.0, r"null or a number in \(0, 1\)"),
        ("targets", "(", "a regular expression"),
        ("targets", 3, "ffn, attention, all, a regular expression or a predicate"),
        ("exclude", ["("], "a regular expression"),
        ("shadow", "[", "a regular expression"),
    ],
)
def test_each_field_says_what_is_legal(field: str, value: object, legal: str) -> None:
    with pytest.raises(ConfigError, match=rf"mole\.{field} = .* is not legal: {legal}"):
        MoleConfig(**{field: value})


def test_plain_values_make_the_same_configuration() -> None:
    config = MoleConfig(store="int2", rank=0.25, exclude=("head",))
    assert MoleConfig.of(config.plain()) == config
    with pytest.raises(ConfigError, match=r"mole = 'stor' is not legal: one of the fields store, block"):
        MoleConfig.of({"stor": "int4"})


# convert and revert


def test_the_model_is_the_model_again() -> None:
    model = gpt()
    modules = dict(model.named_modules())
    params, state = list(model.parameters()), {name: value.clone() for name, value in model.state_dict().items()}
    report = convert(model, MoleConfig(targets="all", min_features=1))
    assert {name: type(module) for name, module in model.named_modules()} != {name: type(module) for name, module in modules.items()}
    assert model.state_dict().keys() == state.keys()
    assert all(one is two for one, two in zip(model.parameters(), params, strict=True))
    assert set(report.converted) <= set(modules)
    model.eval()
    revert(model)
    assert all(module is modules[name] and not module.training for name, module in model.named_modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("targets", "words"), [("attention", "attention"), ("ffn", "feedforward")])
def test_targets_by_part(targets: str, words: str) -> None:
    report = convert(gpt(), MoleConfig(targets=targets, norms=False))
    assert report.converted and all(words in name for name in report.converted)


def test_targets_by_pattern_predicate_and_exclusion() -> None:
    assert set(convert(gpt(), MoleConfig(targets=r"blocks\.0\.attention\.(query|out)", norms=False)).converted) == {
        "blocks.0.attention.query",
        "blocks.0.attention.out",
    }
    assert set(convert(gpt(), MoleConfig(targets=lambda name, module: name == "head")).converted) == {"head"}
    report = convert(gpt(), MoleConfig(targets="all", exclude=("head", r"blocks\.0")))
    assert report.converted and not any(name == "head" or name.startswith("blocks.0.") for name in report.converted)


def test_nothing_to_convert_is_an_error_that_says_why() -> None:
    with pytest.raises(ConfigError, match=r"mole\.targets = 'nowhere' is not legal: .*it names none"):
        convert(gpt(), MoleConfig(targets="nowhere"))
    frozen = gpt().requires_grad_(False)
    with pytest.raises(ConfigError, match="its weight is frozen, so its input is not kept anyway"):
        convert(frozen, MoleConfig(targets="all"))


def test_converting_twice_is_refused() -> None:
    model = gpt()
    convert(model, MoleConfig())
    with pytest.raises(ConfigError, match=r"revert\(model\) first"):
        convert(model, MoleConfig())


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Casting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def test_what_stays_and_why() -> None:
    model = nn.Sequential(nn.Linear(96, 96), Halved(96, 96), nn.Linear(8, 96), nn.Embedding(4, 96))
    model.append(nn.utils.parametrizations.weight_norm(nn.Linear(96, 96)))
    model.append(nn.Linear(96, 96).requires_grad_(False))
    report = convert(model, MoleConfig(targets="all"))
    assert set(report.converted) == {"0"}
    assert report.skipped["1"] == "the forward of Halved is not x Wᵀ + bias"
    assert report.skipped["2"] == "its 8 inputs are fewer than min_features = 64"
    assert report.skipped["4"] == "its weight is computed (a parametrization)"
    assert report.skipped["5"].startswith("its weight is frozen")
    assert "1: left alone, the forward of Halved" in str(report)


# exactness


@pytest.mark.parametrize("targets", ["ffn", "attention", "all"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_the_dense_store_is_autograd(targets: str, chunk: int | None) -> None:
    model = gpt()
    before, expected = loss(model).item(), gradients(model)
    convert(model, MoleConfig(targets=targets, chunk=chunk, **EXACT))
    assert loss(model).item() == pytest.approx(before, rel=1e-6)
    close(gradients(model), expected)


@pytest.mark.parametrize("store", ["int8", "nf4", "int4", "int2", "bf16"])
def test_outputs_do_not_depend_on_the_store(store: str) -> None:
    model = gpt()
    before = loss(model).item()
    convert(model, MoleConfig(store=store, targets="all"))
    assert loss(model).item() == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("kind", [nn.Linear, Casting])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (0, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_input_shape_and_bias(kind: type[nn.Linear], shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(64, 40, bias=bias))
    x = torch.randn(shape, requires_grad=True)

    def run() -> list[Tensor]:
        grads = gradients(model, lambda model: (model(x).sin()).sum())
        found, x.grad = [*grads.values(), x.grad.clone()], None
        return found

    expected = run()
    convert(model, MoleConfig(targets="all", **EXACT))
    for one, two in zip(run(), expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_a_layer_that_casts_its_weight_takes_any_dtype_and_another_refuses() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 64).bfloat16()
    casting = nn.Sequential(Casting(64, 32))
    expected = gradients(casting, lambda model: model(x).float().square().sum())
    convert(casting, MoleConfig(targets="all", **EXACT))
    assert casting(x).dtype == torch.bfloat16
    close(gradients(casting, lambda model: model(x).float().square().sum()), expected, 1e-2)
    plain = nn.Sequential(nn.Linear(64, 32))
    convert(plain, MoleConfig(targets="all"))
    with pytest.raises(RuntimeError, match="dtype"):
        plain(x)


def test_autocast_is_followed_and_gradients_keep_the_weights_dtype() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    x = torch.randn(8, 64)

    def of(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        return y.float().square().sum()

    expected = gradients(model, of)
    convert(model, MoleConfig(targets="all", **EXACT))
    found = gradients(model, of)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    close(found, expected, 2e-2)


def test_micro_batches_add_up() -> None:
    model = gpt()
    convert(model, MoleConfig(targets="all", **EXACT))
    expected = gradients(model)
    model.zero_grad()
    for _ in range(2):
        (loss(model) / 2).backward()
    close({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("store", ["dense", "int4"])
def test_under_activation_checkpointing(store: str) -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(16, 64, requires_grad=True)
    convert(model, MoleConfig(store=store, targets="all"))
    torch.manual_seed(3)
    expected = gradients(model, lambda model: model(x).square().sum())
    torch.manual_seed(3)
    found = gradients(model, lambda model: checkpoint(model, x, use_reentrant=False).square().sum())
    close(found, expected)


@pytest.mark.parametrize("kind", ["relu2", "gated silu"])
def test_an_mlp_gives_what_autograd_is_asked_for(kind: str) -> None:
    """Its weights' gradients are made at places of their own in the graph: any of them alone, twice over, through hooks, recomputed."""
    from torch.func import functional_call
    from torch.utils.checkpoint import checkpoint

    model, x = residual(kind), torch.randn(5, 64, requires_grad=True)
    params = dict(model.named_parameters())
    inputs = [x, *params.values()]
    expected = torch.autograd.grad(model(x).sin().sum(), inputs)
    convert(model, MoleConfig(**EXACT))

    def same(found: list[Tensor]) -> None:
        close(dict(enumerate(found)), dict(enumerate(expected)))

    y = model(x).sin().sum()
    same([torch.autograd.grad(y, [one], retain_graph=True)[0] for one in inputs])
    y.backward(retain_graph=True)
    y.backward()
    same([one.grad / 2 for one in inputs])
    for reentrant in (True, False):
        model.zero_grad()
        x.grad = None
        hooks = [p.register_hook(lambda grad: 2 * grad) for p in params.values()]
        checkpoint(model, x, use_reentrant=reentrant).sin().sum().backward()
        for hook in hooks:
            hook.remove()
        same([x.grad, *(p.grad / 2 for p in params.values())])
    same(torch.autograd.grad(functional_call(model, {n: 1.0 * p for n, p in params.items()}, (x,)).sin().sum(), inputs))  # not leaves
    model.zero_grad()
    twice = torch.autograd.grad(model(model(x)).sum(), inputs)
    revert(model)
    close(dict(enumerate(twice)), dict(enumerate(torch.autograd.grad(model(model(x)).sum(), inputs))))


def test_a_weight_used_twice_gets_both_gradients() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x = torch.randn(8, 64)
    expected = gradients(model, lambda model: model(x).square().sum())
    convert(model, MoleConfig(targets="all", **EXACT))
    assert isinstance(model[0], MoleLinear) and model[0] is model[2]
    close(gradients(model, lambda model: model(x).square().sum()), expected)


def test_a_copy_and_a_pickle_train_alone() -> None:
    model = gpt()
    convert(model, MoleConfig(targets="all", **EXACT))
    expected = gradients(model)
    other = copy.deepcopy(model)
    close(gradients(other), expected)
    assert not any(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    close(gradients(torch.load(buffer, weights_only=False)), expected)


# MLPs


class Plain(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], bias: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act, self.drop = nn.Linear(64, 96, bias), nn.Linear(96, 64, bias), act, nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(self.act(self.c_fc(x))))


class Gated(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.down_proj, self.up_proj, self.gate_proj = nn.Linear(96, 64, bias), nn.Linear(64, 96, bias), nn.Linear(64, 96, bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def tanh_gelu(u: Tensor) -> Tensor:
    return functional.gelu(u, approximate="tanh")


MLPS = {
    "relu2": lambda: Plain(lambda u: functional.relu(u).square(), bias=False),
    "relu": lambda: Plain(functional.relu),
    "gelu": lambda: nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)),
    "gelu_tanh": lambda: Plain(tanh_gelu),
    "silu": lambda: Plain(nn.SiLU()),
    "gated silu": lambda: Gated(nn.SiLU()),
    "gated gelu": lambda: Gated(functional.gelu, bias=True),
}


class Residual(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def residual(kind: str) -> Residual:
    torch.manual_seed(0)
    return Residual(MLPS[kind]())


@pytest.mark.parametrize("kind", MLPS)
@pytest.mark.parametrize("hidden", ["codes", "recompute"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_an_mlp_is_known_by_what_it_computes_and_is_exact(kind: str, hidden: str, chunk: int | None) -> None:
    model = residual(kind)
    x = torch.randn(2, 6, 64, requires_grad=True)

    def of(model: nn.Module) -> Tensor:
        return model(x).sin().sum()

    expected = gradients(model, of) | {"x": x.grad.clone()}
    before, x.grad = of(model).item(), None
    report = convert(model, MoleConfig(targets="ffn", hidden=hidden, chunk=chunk, **EXACT))
    assert report.converted["mlp"].startswith(f"MLP with {kind.split()[-1]}")
    assert of(model).item() == pytest.approx(before, rel=1e-5)
    close(gradients(model, of) | {"x": x.grad}, expected)


def test_what_is_not_such_an_mlp_is_converted_layer_by_layer() -> None:
    for mlp in (Plain(torch.tanh), Plain(nn.SiLU(), drop=0.1), nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 64))):
        report = convert(Residual(mlp), MoleConfig(targets="ffn"))
        assert len(report.converted) == 2 and all(what.startswith("linear") for what in report.converted.values())


def test_an_mlp_whose_output_starts_at_zero_is_known_too() -> None:
    model = residual("gelu")
    nn.init.zeros_(model.mlp[2].weight)
    assert convert(model, MoleConfig()).converted["mlp"].startswith("MLP with gelu,")
    assert convert(gpt().to("meta"), MoleConfig()).converted["blocks.0.feedforward"].startswith("MLP with relu2")


@pytest.mark.parametrize(("kind", "store"), [("relu2", "int2"), ("gelu", "int2"), ("gated silu", "int2"), ("gated silu", "int4")])
def test_unbiased_codes_leave_every_gradient_unbiased(kind: str, store: str) -> None:
    model = residual(kind)
    x = torch.randn(24, 64, requires_grad=True)

    def of(model: nn.Module) -> Tensor:
        return (model(x) * torch.linspace(-1, 1, 64)).sum()

    expected = gradients(model, of) | {"x": x.grad.clone()}
    convert(model, MoleConfig(store=store))

    def worst(draws: int = 400) -> float:
        """Largest deviation of the mean, in standard errors, of some projections of each gradient: on itself, its sign and Gaussians."""
        found: dict[str, list[Tensor]] = {name: [] for name in expected}
        axes = {
            name: torch.stack([value, value.sign(), *torch.randn(8, *value.shape, generator=torch.Generator().manual_seed(0))]).flatten(1)
            for name, value in expected.items()
        }
        for _ in range(draws):
            x.grad = None
            for name, value in (gradients(model, of) | {"x": x.grad}).items():
                found[name].append(axes[name] @ (value - expected[name]).flatten())
        deviations = []
        for name, values in found.items():
            error = torch.stack(values)  # (draws, axes)
            rounding = 1e-5 * axes[name].norm(dim=1) * expected[name].norm()
            deviations.append(float((error.mean(0) / (error.std(0) / draws**0.5 + rounding)).abs().max()))
        return max(deviations)

    assert worst() < 5.0
    for layer in model.mlp.mole:
        layer.config = MoleConfig(store=store, hidden="recompute")
    if store == "int2":  # where rounding passes through the activation the bias shows, so the test can see one
        assert worst() > 5.0


def test_relu2_and_its_derivative_share_one_code() -> None:
    """Unbiased, both; less than a third of the variance of codes of two bits each, in no more bytes."""
    torch.manual_seed(0)
    r, draws, codec = torch.randn(1000).relu_(), 2000, codecs.get("int2", block=64)  # the last block is short
    saved = [pair.save(r, 64, "mlp") for _ in range(draws)]
    found = [torch.stack([read(one) for one in saved]) for read in (pair.value, pair.derivative)]
    for exact, each in zip((r.square(), 2 * r), found, strict=True):
        axes = torch.stack([exact, exact.sign(), *torch.randn(8, 1000)])
        errors = (each - exact) @ axes.mT  # (draws, axes)
        assert float((errors.mean(0) / errors.std(0)).abs().max()) * draws**0.5 < 5.0
        separate = sum(float((codec.decode(codec.encode(exact)) - exact).square().sum()) for _ in range(50)) / 50
        assert float((each - exact).square().sum()) / draws < separate / 3
    assert pair.save(r, 64, "mlp").nbytes == 500 + 2 * 16 < 2 * codec.nbytes((1000,))
    for read in (pair.value, pair.derivative):
        zeros = read(pair.save(torch.zeros(3, 5).bfloat16(), 64, "mlp"))
        assert zeros.dtype == torch.bfloat16 and zeros.shape == (3, 5) and not zeros.any()
    with pytest.raises(NonFinite, match="the input of mlp holds NaN"):
        pair.save(torch.tensor([1.0, float("nan")]), 64, "mlp")


def test_what_a_norm_keeps_is_read_exactly_and_kept_once() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = nn.RMSNorm(64, elementwise_affine=False), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.first(y).sin() + self.second(y)

    model, x = Normed(), torch.randn(5, 64, requires_grad=True)
    expected = gradients(model, lambda model: model(x).sum())
    convert(model, MoleConfig(store="int2", targets="all"))
    close(gradients(model, lambda model: model(x).sum()), expected)
    ledger = MemoryLedger(model)
    with ledger.activations():
        model.norm(x)
    assert model.first.mole.kept == model.second.mole.kept == 0 and ledger.saved_activations == x.nbytes + 5 * 4
    model(x.detach())  # no gradient flows into the norm, so it keeps nothing
    assert model.first.mole.kept > 0
    shared, y = model.first.mole.shared, model.norm(x)
    assert shared.kept(y) and not shared.kept(y.clone())
    y.detach().mul_(2.0)
    assert not shared.kept(y), "changed in place: not what was kept"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_keeps_its_output_and_is_torchs(dtype: torch.dtype) -> None:
    x = torch.randn(4, 7, 64).to(dtype).requires_grad_()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(64, elementwise_affine=False), nn.Linear(64, 64, dtype=dtype)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    model = Normed()
    expected = model.norm(x).detach()
    grads = gradients(model, lambda model: model(x).float().sin().sum()) | {"x": x.grad}
    x.grad = None
    assert convert(model, MoleConfig(targets="all", **EXACT)).converted["norm"] == "norm that keeps its output"
    assert torch.allclose(model.norm(x).float(), expected.float(), rtol=tolerance, atol=tolerance)
    close(gradients(model, lambda model: model(x).float().sin().sum()) | {"x": x.grad}, grads, tolerance)
    assert saved_bytes(model, x) == x.numel() * dtype.itemsize + x[..., 0].numel() * 4, "the output, which is the input of the next"


# memory


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    ledger = MemoryLedger(model)
    with ledger.activations():
        y = model(x)
    y.sum().backward()
    return ledger.saved_activations


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


def test_an_input_that_is_not_finite_is_named() -> None:
    model = gpt()
    convert(model, MoleConfig())
    with torch.no_grad():
        model.blocks[1].feedforward.up.weight.fill_(float("nan"))
    with pytest.raises(NonFinite, match=r"blocks\.1\.feedforward"):
        loss(model)

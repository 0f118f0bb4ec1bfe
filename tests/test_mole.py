"""MoleGrad's conversion and its exact parts: every model is the model, every gradient that promises to be exact is."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mango import models
from mango.errors import ConfigError, NonFinite
from mango.mole import MoleConfig, MoleLinear, convert, revert
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


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    ledger = MemoryLedger(model)
    with ledger.activations():
        y = model(x)
    y.sum().backward()
    return ledger.saved_activations


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


def test_an_input_that_is_not_finite_is_named() -> None:
    model = gpt()
    convert(model, MoleConfig())
    with torch.no_grad():
        model.blocks[1].feedforward.up.weight.fill_(float("nan"))
    with pytest.raises(NonFinite, match=r"blocks\.1\.feedforward"):
        loss(model)

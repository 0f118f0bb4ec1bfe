"""Converted MLPs and norms: exact where they promise it, unbiased where codes are drawn, one code where one suffices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_mole import EXACT, close, gpt, gradients, saved_bytes
from torch import Tensor, nn
from torch.nn import functional

from mango import codecs
from mango.errors import NonFinite
from mango.mole import MoleConfig, convert, pair, revert
from mango.telemetry import MemoryLedger


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

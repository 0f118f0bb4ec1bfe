"""Products of converted layers in eight-bit floats: the arithmetic on the CPU, which emulates them, and a card that has units for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mango.draws import gaussian
from mango.errors import ConfigError
from mango.mole import MoleConfig, convert, products

CARD = torch.device("cuda")
on_card = pytest.mark.skipif(
    not (torch.cuda.is_available() and products.units(CARD)), reason="needs a card with units for eight-bit floats"
)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a device with units: torch computes the same there, slowly."""
    monkeypatch.setattr(products, "units", lambda device: True)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# relative spacing of normal numbers, and spacing below them, of which rounding errs by at most a half
@pytest.mark.parametrize(("kind", "relative", "absolute"), [(products.VALUES, 2**-3, 2**-9), (products.GRADIENTS, 2**-2, 2**-16)])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_codes_err_by_half_of_their_spacing(kind: torch.dtype, relative: float, absolute: float, size: float) -> None:
    x = gaussian((64, 48), (1,)) * size
    codes, scale = products.quantise(x, kind)
    assert codes.dtype == kind and float(codes.float().abs().max()) == torch.finfo(kind).max
    bound = torch.maximum(x.abs() * relative, scale * absolute) / 2
    assert bool(((codes.float() * scale - x).abs() <= 1.001 * bound).all())


def test_zeros_stay_zeros_and_nan_is_seen() -> None:
    weight = gaussian((32, 16), (1,))
    assert not products.forward(torch.zeros(5, 16), weight, "fp8").any()
    assert products.forward(torch.zeros(0, 16), weight, "fp8").shape == (0, 32)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(5, 16)
        x[2, 3] = bad
        assert not bool(products.forward(x, weight, "fp8")[2].isfinite().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_are_those_of_what_the_codes_stand_for(dtype: torch.dtype) -> None:
    x, dy, weight = (gaussian(shape, (n,)).to(dtype) for n, shape in enumerate([(24, 32), (24, 48), (48, 32)]))

    def rounded(t: Tensor, kind: torch.dtype) -> Tensor:
        codes, scale = products.quantise(t, kind)
        return codes.float() * scale

    w, tolerance = rounded(weight, products.VALUES), 1e-5 if dtype != torch.bfloat16 else 1e-2
    y, dx = products.forward(x, weight, "fp8"), products.backward(dy, weight, "fp8")
    assert y.dtype == dx.dtype == dtype
    assert error(y, rounded(x, products.VALUES) @ w.mT) < tolerance and error(y, x @ weight.mT) < 0.06
    assert error(dx, rounded(dy, products.GRADIENTS) @ w) < tolerance and error(dx, dy @ weight) < 0.09
    held = torch.ones_like(dx)
    assert products.backward(dy, weight, "fp8", out=held, add=True) is held
    assert error(held, dx + 1) < tolerance
    assert products.forward(x, weight, "fp8", out=torch.empty_like(y)).equal(y)


class MLP(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(96, 64)
        self.gate_proj = nn.Linear(64, 96) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(functional.relu(self.up_proj(x)).square())
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Residual(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.mlp, self.linear = MLP(gated), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.mlp(x))


def agrees(gated: bool, chunk: int | None, device: torch.device | str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Residual(gated).to(device, dtype), gaussian((2, 12, 64), (1,)).to(device, dtype).requires_grad_()

    def run() -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.float().sin().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in model.parameters())]

    expected = run()
    convert(model, MoleConfig(store="dense", targets="all", matmul="fp8", chunk=chunk))
    found = run()
    assert not found[0].equal(expected[0]), "rounded"
    with torch.no_grad():
        assert error(model(x), expected[0]) < 1e-5, "without gradients products are exact"
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype and error(one, two) < 0.15


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
def test_converted_layers_compute_in_eight_bits(gated: bool, chunk: int | None, emulated: None) -> None:
    agrees(gated, chunk, "cpu", torch.float32)


@on_card
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_layers_compute_in_eight_bits_on_a_card(gated: bool, dtype: torch.dtype) -> None:
    agrees(gated, None, CARD, dtype)


def test_a_device_without_units_and_a_shape_that_does_not_fit_are_named(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 40))
    report = convert(model, MoleConfig(targets="all", matmul="fp8"))
    assert set(report.converted) == {"0"} and report.skipped == {"1": "its weight is (40, 64), and fp8 needs multiples of 16"}
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"mole\.matmul = 'fp8' is not legal: auto: cpu has no units for eight-bit floats"):
        convert(nn.Sequential(nn.Linear(64, 64)), MoleConfig(targets="all", matmul="fp8"))

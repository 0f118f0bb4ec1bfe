"""Products with a stack of large matrices as int8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mango import products
from mango.draws import gaussian
from mango.errors import ConfigError
from mango.optim import LayerPlan, Mango
from mango.optim.layers import Hyper, LayerStack
from mango.orthonormal import orthonormalize
from mango.products import FEW, MOST, ByteMatrices, Lift
from mango.subspace import captured_energy, half_step, power_step
from mango.workspace import Workspace

CPU = torch.device("cpu")


def stack(x: torch.Tensor, turned: bool) -> ByteMatrices:
    """The ByteMatrices A (layers, m, n) of x = A or, turned, of x = Aᵀ."""
    return ByteMatrices(x.mT.contiguous() if turned else x, turned, Workspace(CPU))


@given(
    layers=st.integers(1, 3),
    m=st.integers(2, 70),
    n=st.integers(2, 90),
    k=st.integers(1, 9),
    turned=st.booleans(),
    scale=st.sampled_from([1.0, 1e-20, 1e10]),
    seed=st.integers(0, 1000),
)
def test_products_are_within_the_rounding_of_both_operands(
    layers: int, m: int, n: int, k: int, turned: bool, scale: float, seed: int
) -> None:
    a = gaussian((layers, m, n), (seed, 0)) * scale
    found = stack(a, turned)
    for x, product, exact in (
        (gaussian((layers, k, m), (seed, 1)), found.left, lambda x: x.double() @ a.double()),
        (gaussian((layers, k, n), (seed, 2)), found.right, lambda x: x.double() @ a.double().mT),
    ):
        # each operand errs by at most half a scale, 1/254 of its largest magnitude; a bound that needs no row of them
        one, other = x.double().abs().amax(), a.double().abs().amax()
        inner = x.shape[-1]
        most = inner * one * other * (2 / 254 + 1 / 254**2)
        assert float((product(x).double() - exact(x)).abs().max()) <= float(most) * 1.001
        assert product(x).dtype == torch.float32


@given(
    m=st.integers(2, 200),
    n=st.integers(2, 300),
    k=st.integers(2, 9),
    turned=st.booleans(),
    integers=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_factor_is_lifted_within_the_rounding_of_both_in_bands_as_at_once(
    m: int, n: int, k: int, turned: bool, integers: bool, seed: int
) -> None:
    basis, factor = gaussian((2, m, k), (seed, 0)), gaussian((2, k, n), (seed, 1))
    exact = basis.double() @ factor.double()
    exact = exact.mT if turned else exact
    lift = Lift(basis, turned, integers, Workspace(CPU))
    ((_, _, at_once),) = lift.products(factor, whole=True)
    found = at_once.floats().clone()  # of floats it is the workspace's, which the bands are about to take
    largest = k * float(basis.abs().amax() * factor.abs().amax())
    rounding = torch.finfo(torch.float32).eps
    assert float((found - exact).abs().max()) <= largest * ((2 / 254 + 1 / 254**2) * 1.001 if integers else rounding)
    banded, count = torch.full_like(found, torch.nan), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "CACHED", 1)
        for layers, rows, product in lift.products(factor, whole=False):
            banded[layers, rows] = product.floats()
            count += 1
    assert count == 2 * max(1, len(found[0]) // 64)
    assert torch.equal(banded, found) if integers else float((banded - exact).abs().max()) <= largest * rounding


def test_a_basis_of_few_directions_is_lifted_as_floats_unless_bytes_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    shape = (1024, 1024)
    assert [products.in_bytes(shape, rank, CPU, "auto") for rank in (1, FEW, FEW + 1)] == [False, False, True]
    assert [products.in_bytes(shape, rank, CPU, "int8") for rank in (1, FEW, FEW + 1)] == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_large_matrices_are_multiplied_alike_from_either_side(dtype: torch.dtype, turned: bool) -> None:
    a, b = gaussian((2, 400, 500), (0,)).to(dtype), gaussian((2, 400 if turned else 500, 8), (1,)).to(dtype)
    a = a.mT if turned else a
    found, exact = products.matmul(a, b), a.double() @ b.double()
    assert found.dtype == dtype and found.shape == exact.shape
    assert float((found.double() - exact).norm() / exact.norm()) < 4 * torch.finfo(dtype).eps
    if dtype == torch.bfloat16:
        assert (found.stride(-1) == 1) != turned, "a transposed matrix is read as it lies"


def test_integers_that_fill_the_codes_are_multiplied_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    a, x = (torch.randint(-127, 128, shape, generator=draw).float() for shape in ((2, 40, 60), (2, 5, 40)))
    a[..., 0], x[..., 0] = 127.0, 127.0  # so that every scale is 1
    assert torch.equal(stack(a, False).left(x), x @ a)


@pytest.mark.parametrize("turned", [False, True])
def test_small_rows_are_divided_before_they_are_multiplied(turned: bool) -> None:
    """Their products would underflow in float32."""
    a, x = gaussian((1, 40, 60), (1,)) * 1e-25, gaussian((1, 5, 60), (2,)) * 1e-25
    over = torch.full((1, 5), 1e-25)
    expected = (x.double() / 1e-25) @ a.double().mT
    found = stack(a, turned).right(x, over).double()
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("turned", [False, True])
def test_a_basis_from_bytes_captures_what_one_from_floats_does(turned: bool) -> None:
    a = gaussian((2, 48, 8), (1,)) @ gaussian((2, 8, 96), (2,)) + 0.3 * gaussian((2, 48, 96), (3,))
    start, rows = orthonormalize(gaussian((2, 48, 6), (4,))), gaussian((2, 6, 96), (5,))
    for rough, exact in (
        (power_step(start, stack(a, turned))[0], power_step(start, a)[0]),
        (power_step(start, stack(a, turned)[..., 1::2])[0], power_step(start, a[..., 1::2])[0]),
        (power_step(start, stack(a, turned)[..., :48])[0], power_step(start, a[..., :48])[0]),
        (half_step(stack(a, turned), rows), half_step(a, rows)),
    ):
        assert float((rough.mT @ rough - torch.eye(6)).abs().max()) < 1e-2
        assert torch.allclose(captured_energy(rough, a), captured_energy(exact, a), rtol=5e-3)
    assert float((power_step(start, stack(a, turned)[..., :48])[0] - power_step(start, a)[0]).abs().max()) > 0.1


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
@pytest.mark.parametrize("plan", [{}, {"error": "none"}, {"power": "half"}, {"error": "none", "power": "sampled", "scaling": "column"}])
def test_training_with_bytes_is_training(shape: tuple[int, int], plan: dict[str, str]) -> None:
    """A regression on random inputs: as near to the truth, from a distance of 1, as with float32."""

    def loss(matmul: str) -> float:
        truth, weight = gaussian(shape, (1,)), torch.nn.Parameter(torch.zeros(shape))
        optimizer = Mango([("w", weight)], lr=0.05, plan=plan, matmul=matmul)
        for step in range(60):
            x = gaussian((64, shape[1]), (2, step))
            optimizer.zero_grad()
            (x @ (weight - truth).mT).square().mean().backward()
            optimizer.step()
        return float((weight.detach() - truth).square().mean())

    assert abs(loss("int8") - loss("float32")) < 1e-3


def test_nothing_is_certified_of_products_in_bytes() -> None:
    weight = torch.nn.Parameter(gaussian((80, 90), (1,)))
    found = {}
    for matmul in ("float32", "int8"):
        optimizer = Mango([("w", weight)], matmul=matmul)
        optimizer.observe()
        weight.grad = gaussian((80, 90), (2,))
        optimizer.step()
        found[matmul] = optimizer.diagnostics()["w"]["certified"]
    assert found["float32"] > 0.0 and found["int8"] == 0.0


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_a_matrix_with_a_side_of_one_is_multiplied_as_floats(shape: tuple[int, int]) -> None:
    """torch 2.13's integer product misreads the strides of such a matrix on a CPU."""
    found = []
    for matmul in ("float32", "int8"):
        weight = torch.nn.Parameter(gaussian(shape, (1,)))
        optimizer = Mango([("w", weight)], lr=0.1, matmul=matmul)
        weight.grad = gaussian(shape, (2,))
        optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


def test_sums_fit_their_integers() -> None:
    assert MOST * 127**2 < 2**31


def test_an_unknown_arithmetic_is_refused() -> None:
    with pytest.raises(ConfigError, match="int4"):
        Mango([torch.nn.Parameter(torch.zeros(8, 8))], matmul="int4")


def test_weak_directions_survive_the_default_arithmetic() -> None:
    """Of a gradient whose strong directions hold nearly all of it; products in bytes are not the default because they do not."""
    loud = gaussian((1024,), (3,)).mul(1.5).exp()  # a few columns stand out, as of a layer behind relu²
    left, _, right = torch.linalg.svd(gaussian((512, 8), (1,)) @ (gaussian((8, 1024), (2,)) * loud), full_matrices=False)
    h = ((left[:, :8] * 10.0 ** (-torch.arange(8.0) / 4)) @ right[:8]).unsqueeze(0)
    stack, basis = LayerStack(LayerPlan(rank=8, error="none"), (512, 1024), 1, CPU, "w"), left[:, :8].unsqueeze(0)
    worst = {}
    for matmul in ("auto", "int8"):
        hyper = Hyper(1e-3, (0.9, 0.999), 1e-8, 0.0, False, 1, [(0,)], matmul)
        used = basis.bfloat16()
        found = stack._project(used, stack._operand(h, torch.bfloat16, hyper, Workspace(CPU))[0], Workspace(CPU))
        exact = used.float().mT @ h
        worst[matmul] = float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
    assert worst["auto"] < 0.02
    assert worst["int8"] > 0.1

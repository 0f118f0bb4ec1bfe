"""Factored gradients and the sketch store: exact at full rank, top-k or unbiased below it, and stepped without being formed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mango.draws import gaussian
from mango.errors import ConfigError, NonFinite
from mango.mole import Factors, MoleConfig, MoleOptimizer, convert
from mango.mole import optimizer as mole_optimizer
from mango.mole.factors import leave, take
from mango.orthonormal import orthonormalize

SHAPES = [(96, 64), (64, 96), (64, 64)]  # (outputs, inputs)


def layer(shape: tuple[int, int]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))


def data(shape: tuple[int, int], rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients; of a gradient of this rank."""
    a, b = gaussian((80, shape[1]), (1,)), gaussian((80, shape[0]), (2,))
    if rank is not None:
        a = gaussian((80, rank), (3,)) @ gaussian((rank, shape[1]), (4,))
    return a, b


def backward(model: nn.Module, a: Tensor, b: Tensor) -> None:
    (model(a) * b).sum().backward()


def found(model: nn.Sequential) -> Tensor:
    """The gradient, wherever it was left."""
    weight = model[0].weight
    factors = take(weight)
    grad = weight.grad if factors is None else factors.product()
    weight.grad = None
    assert grad is not None
    return grad


def error(approximation: Tensor, exact: Tensor) -> float:
    return float((approximation - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("store", ["dense", "sketch"])
@pytest.mark.parametrize("gradient", ["formed", "factored"])
def test_a_full_rank_is_exact(shape: tuple[int, int], fill: bool, store: str, gradient: str) -> None:
    model, (a, b) = layer(shape), data(shape)
    convert(model, MoleConfig(store=store, gradient=gradient, rank=1.0 if store == "dense" else 96, targets="all", fill_grad=fill))
    for _ in range(3):
        backward(model, a, b)
        assert (model[0].weight.grad is None) == (gradient == "factored" and not fill)
        assert error(found(model), b.mT @ a) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_leading_directions_are_found_and_kept(shape: tuple[int, int]) -> None:
    model, (a, b) = layer(shape), data(shape, rank=6)
    convert(model, MoleConfig(store="dense", gradient="factored", rank=8, targets="all", warm_start_decay=0.0))
    for _ in range(3):
        backward(model, a, b)
        last = found(model)
    assert error(last, b.mT @ a) < 1e-4, "a gradient of a lower rank than the basis is captured whole"


def test_power_steps_approach_the_best_factors() -> None:
    shape = (64, 96)
    a, b = data(shape)
    exact = b.mT @ a
    best = (torch.linalg.svdvals(exact)[8:].square().sum() / exact.square().sum()).sqrt()
    errors = []
    for iterations in (1, 2, 4):
        model = layer(shape)
        convert(model, MoleConfig(store="dense", gradient="factored", rank=8, power_iters=iterations, targets="all"))
        backward(model, a, b)
        errors.append(error(found(model), exact))
    assert float(best) <= errors[2] < errors[1] < errors[0] < 1.0
    assert errors[2] < 1.05 * float(best)


def test_decay_follows_the_running_gradient_and_zero_the_present_one() -> None:
    shape, errors = (64, 96), []
    first, second = data(shape, rank=4)[0], gaussian((80, 4), (7,)) @ gaussian((4, 96), (8,))
    b = data(shape)[1]
    for decay in (0.0, 0.95):
        model = layer(shape)
        config = MoleConfig(store="dense", gradient="factored", rank=4, scouts=0, warm_start_decay=decay, targets="all")
        convert(model, config)
        for a in (first, first, first, second):
            backward(model, a, b)
            last = found(model)
        errors.append(error(last, b.mT @ second))
    assert errors[0] < 0.05 and errors[1] > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_unbiased_residual_is_unbiased(shape: tuple[int, int]) -> None:
    a, b = data(shape)
    exact, draws = b.mT @ a, 300
    model = layer(shape)
    convert(model, MoleConfig(store="dense", gradient="factored", rank=8, residual="unbiased", residual_rank=8, targets="all", scouts=0))
    axes = torch.stack([exact.flatten(), exact.sign().flatten(), *gaussian((8, exact.numel()), (5,))])
    values = []
    for _ in range(draws):
        backward(model, a, b)
        values.append(axes @ (found(model) - exact).flatten())
    errors = torch.stack(values)
    assert float((errors.mean(0) / (errors.std(0) / draws**0.5)).abs().max()) < 5.0
    assert float(errors.std(0).min()) > 0.0


def test_the_carried_residual_is_added_to_the_next_gradient() -> None:
    """The same gradient again and again: truncation loses the small directions, carrying lets them come up in turn."""
    shape, steps = (64, 96), 24
    a, b = data(shape, rank=8)
    exact, sums = b.mT @ a, {}
    for residual in ("none", "carried"):
        model = layer(shape)
        config = MoleConfig(
            store="dense", gradient="factored", rank=4, residual=residual, residual_rank=8, targets="all", warm_start_decay=0.0
        )
        convert(model, config)
        total = torch.zeros(shape)
        for _ in range(steps):
            backward(model, a, b)
            total += found(model)
        sums[residual] = error(total / steps, exact)
    assert sums["carried"] < 0.25 < 0.4 < sums["none"]


def test_the_rank_adapts_to_the_energy() -> None:
    shape = (64, 96)
    a, b = data(shape, rank=3)
    model = layer(shape)
    convert(model, MoleConfig(store="dense", gradient="factored", rank=16, energy_target=0.99, targets="all", power_iters=3))
    backward(model, a, b)
    factors = take(model[0].weight)
    assert factors is not None and factors.basis.shape == (64, 3)


def test_trust_scaling_restores_the_norm() -> None:
    shape = (64, 96)
    a, b = data(shape)
    exact = float((b.mT @ a).norm())
    norms = []
    for trust in (False, True):
        model = layer(shape)
        convert(model, MoleConfig(store="dense", gradient="factored", rank=8, trust_scaling=trust, probes=64, targets="all"))
        backward(model, a, b)
        norms.append(float(found(model).norm()) / exact)
    assert norms[0] < 0.8 and norms[1] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_micro_batches_add_up_to_the_leading_part_of_their_sum(shape: tuple[int, int]) -> None:
    model, (a, b) = layer(shape), data(shape, rank=4)
    other = gaussian((80, shape[0]), (6,))
    convert(model, MoleConfig(store="dense", gradient="factored", rank=16, targets="all", power_iters=2, warm_start_decay=0.0))
    backward(model, a, b)
    backward(model, a, other)
    factors = take(model[0].weight)
    assert factors is not None and factors.basis.shape[1] == 16
    assert error(factors.product(), (b + other).mT @ a) < 1e-3
    gram = factors.basis.mT @ factors.basis
    assert torch.allclose(gram, torch.eye(16), atol=1e-5)


@pytest.mark.parametrize("basis", ["scouts", "random"])
def test_only_the_sketch_is_saved(basis: str) -> None:
    from mango.telemetry import MemoryLedger

    shape = (64, 96)
    model, (a, b) = layer(shape), data(shape)
    convert(model, MoleConfig(store="sketch", sketch_basis=basis, rank=8, targets="all"))
    ledger = MemoryLedger(model)
    with ledger.activations():
        y = model(a)
    assert ledger.saved_activations == (80 * 8 + 96 * 8) * 4
    before = model[0].mole.sketch.basis.clone()
    (y * b).sum().backward()
    q = before
    assert error(found(model), b.mT @ a @ q @ q.mT) < 1e-5
    after = model[0].mole.sketch.basis
    assert torch.allclose(after.mT @ after, torch.eye(8), atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_scouts_bring_in_what_the_sketch_misses_and_without_them_nothing_comes() -> None:
    shape = (64, 96)
    a, b = data(shape, rank=2)
    shares = []
    for scouts in (0, 4):
        model = layer(shape)
        convert(model, MoleConfig(store="sketch", rank=8, scouts=scouts, warm_start_decay=0.0, targets="all"))
        for _ in range(150):
            backward(model, a, b)
            last = found(model)
        shares.append(float(last.norm().square() / (b.mT @ a).norm().square()))
    assert shares[0] < 0.3 < 0.9 < shares[1]


# the optimizer


def quadratic(scaling: str, rank: int | float = 1.0, steps: int = 120, lr: float = 0.02) -> tuple[float, float, MoleOptimizer]:
    """Fit a linear map by factored gradients; the loss before and after."""
    model = layer((64, 96))
    a = data((64, 96))[0]
    target = a @ gaussian((96, 64), (9,)) / 10
    convert(model, MoleConfig(store="dense", gradient="factored", rank=rank, targets="all", warm_start_decay=0.0))
    optimizer = MoleOptimizer(model.named_parameters(), lr=lr, scaling=scaling)
    losses = []
    for _ in range(steps):
        loss = functional.mse_loss(model(a), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert take(model[0].weight) is None, "consumed"
    return losses[0], losses[-1], optimizer


@pytest.mark.parametrize("scaling", mole_optimizer.SCALINGS)
def test_every_scaling_descends(scaling: str) -> None:
    first, last, optimizer = quadratic(scaling, rank=16)
    assert last < 0.2 * first
    assert optimizer.nbytes() < (3 if scaling == "adam" else 2) * 16 * 96 * 4 + 64 * 16 * 4 + 16 * 16 * 4


@pytest.mark.parametrize("scaling", mole_optimizer.SCALINGS)
def test_a_step_within_autocast_is_the_step_without(scaling: str) -> None:
    stepped = []
    for enabled in (False, True):
        param = nn.Parameter(torch.zeros(64, 96))
        optimizer = MoleOptimizer([param], lr=0.1, scaling=scaling)
        for step in range(3):
            leave(param, Factors(orthonormalize(gaussian((64, 8), (step, 0))), gaussian((8, 96), (step, 1)), columns=False))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
        stepped.append(param.detach())
    assert torch.equal(*stepped)


def test_adam_on_a_basis_that_is_the_identity_is_adam() -> None:
    torch.manual_seed(0)
    one, two = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.empty(8, 12))
    two.data.copy_(one)
    mine = MoleOptimizer([one], lr=0.01, weight_decay=0.1)
    peer = torch.optim.AdamW([two], lr=0.01, weight_decay=0.1)
    for step in range(5):
        grad = gaussian((8, 12), (step,))
        leave(one, Factors(torch.eye(8), grad, columns=False))
        two.grad = grad.clone()
        mine.step()
        peer.step()
    assert torch.allclose(one, two, atol=1e-6)


def test_muon_takes_the_polar_factor_of_the_whole_gradient() -> None:
    param = nn.Parameter(torch.zeros(64, 96))
    grad = data((64, 96), rank=5)
    grad = grad[1].mT @ grad[0]
    basis = orthonormalize(grad @ grad.mT @ gaussian((64, 5), (0,)))
    leave(param, Factors(basis, basis.mT @ grad, columns=False))
    MoleOptimizer([param], lr=1.0, scaling="muon").step()
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    expected = -mole_optimizer.MUON_RMS * (64 * 96 / 5) ** 0.5 * left[:, :5] @ right[:5]
    assert error(param.detach(), expected) < 1e-3


def test_whitening_makes_directions_equal_and_independent() -> None:
    param, mixing = nn.Parameter(torch.zeros(8, 400)), gaussian((8, 8), (1,))
    u = mixing @ gaussian((8, 400), (2,))
    leave(param, Factors(torch.eye(8), u, columns=False))
    MoleOptimizer([param], lr=1.0, scaling="whiten").step()
    step = param.detach()
    assert torch.allclose(step @ step.mT / 400, torch.eye(8), atol=1e-3)


@pytest.mark.parametrize(("scaling", "solver"), [("whiten", "cholesky"), ("muon", "eigh")])
def test_small_problems_of_one_size_are_solved_together(scaling: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, two ranks: two calls a step, and each layer is stepped as it is alone."""
    shapes, calls, inner = [(8, 40), (8, 24), (5, 40)], [], getattr(torch.linalg, solver)

    def counted(matrices: Tensor) -> object:
        calls.append(matrices.shape)
        return inner(matrices)

    def stepped(together: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.zeros(8, n)) for _, n in shapes]
        optimizers = [MoleOptimizer(some, lr=0.1, scaling=scaling) for some in ([params] if together else [[p] for p in params])]
        for step in range(3):
            for number, (param, (k, n)) in enumerate(zip(params, shapes, strict=True)):
                basis = orthonormalize(gaussian((8, k), (step, number)))
                leave(param, Factors(basis, gaussian((k, n), (step, number, 1)), columns=False))
            for optimizer in optimizers:
                optimizer.step()
        return [param.detach() for param in params]

    alone = stepped(together=False)
    monkeypatch.setattr(torch.linalg, solver, counted)
    for one, two in zip(stepped(together=True), alone, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)
    assert calls == 3 * [(2, 8, 8), (1, 5, 5)]


def test_factors_that_are_not_finite_change_nothing() -> None:
    param, other = nn.Parameter(torch.ones(8, 12)), nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    leave(param, Factors(torch.eye(8), torch.full((8, 12), float("nan")), columns=False))
    with pytest.raises(NonFinite, match="the factors of the gradient of weight hold NaN"):
        MoleOptimizer([("other", other), ("weight", param)]).step()
    assert torch.equal(other.detach(), torch.ones(3)) and torch.equal(param.detach(), torch.ones(8, 12))


@pytest.mark.parametrize(
    ("option", "value", "legal"),
    [
        ("lr", -1.0, "a finite number >= 0"),
        ("eps", float("nan"), "a finite number >= 0"),
        ("weight_decay", float("inf"), "a finite number >= 0"),
        ("betas", (0.9, 1.0), r"two numbers in \[0, 1\)"),
        ("scaling", "none", "one of adam, eigen, whiten, muon"),
    ],
)
def test_bad_options_are_named(option: str, value: object, legal: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option} = .* is not legal: {legal}"):
        MoleOptimizer([nn.Parameter(torch.ones(2))], **{option: value})


def test_the_gradients_alive_at_once_are_an_eighth_of_the_dense_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(2)))
    convert(model, MoleConfig(gradient="factored", rank=32, targets="all"))
    model(torch.randn(64, 512)).square().sum().backward()
    held = [param.factors for param in model.parameters()]
    assert all(param.grad is None for param in model.parameters())
    assert sum(factors.nbytes for factors in held) <= sum(param.nbytes for param in model.parameters()) / 8
